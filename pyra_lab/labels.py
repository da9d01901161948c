"""Labels in a figure, placed so that each clearly belongs to its mark. matplotlib is imported where it is used, as in report."""

import itertools

import numpy as np

REACHES = (5, 11, 18, 26, 36, 48, 62, 80)  # from a mark to its label, in points
SIDES = [(1, 0), (-1, 0), (0, 1), (0, -1), *((x, y) for x in (1, -1, 0.5, -0.5) for y in (1, -1, 0.5, -0.5) if abs(x * y) >= 0.5)]


def distances(places, others):
    """Between all places (n, 2) and all others (m, 2): (n, m)."""
    return np.hypot(*(places[:, None] - others).transpose(2, 0, 1))


def gap(box, places):
    """How far a box is from the nearest of places (n, 2): 0 inside it, infinite where there are none."""
    return np.hypot(*np.maximum(0, np.maximum(box.min - places, places - box.max)).T).min(initial=np.inf)


def ring_coinciding(marked, close):
    """Draws a mark that would hide an earlier one, nearer than so many pixels, as a ring around it. marked: [(line, the places of its marks)]."""
    single = [(line, places) for line, places in marked if len(places) == 1]
    for i, (line, place) in enumerate(single):
        if hidden := sum(distances(place, other).item() < close for _, other in single[:i]):
            line.set(markersize=(1 + 0.8 * hidden) * line.get_markersize(), markerfacecolor="none")


def label_points(ax, points, fontsize=7.5):
    """Writes each label of (x, y, text, colour) beside its point, clear of all that is drawn, inside the axes, and nearer to its own mark than to others.

    Where there is no such place it takes the one with the fewest faults, and of those the nearest. A thin line connects a label that stands
    further away. Marks that coincide become rings. Call it last: it needs the final limits of the axes.
    """
    from matplotlib.path import Path
    from matplotlib.transforms import Bbox
    ax.figure.draw_without_rendering()  # computes the layout
    pixels = ax.figure.dpi / 72  # per point
    left, bottom, right, top = ax.get_window_extent().extents + np.multiply([3, 3, 4, 0], pixels)  # left and below are the axes' own lines
    lines = [line for line in ax.lines if line.get_marker() not in ("_", "|")]  # these end error bars
    marked = [(line, ax.transData.transform(line.get_xydata())) for line in lines if line.get_marker() != "None"]
    ring_coinciding(marked, 2.5 * pixels)
    paths = [(line, line.get_path()) for line in lines] + [(bars, path) for bars in ax.collections for path in bars.get_paths()]  # of errors
    drawn = [artist.get_transform().transform_path(path).interpolated(50) for artist, path in paths]
    taken = [text.get_window_extent() for text in ax.texts]

    for (x, y, text, ink), mark in sorted(zip(points, ax.transData.transform([point[:2] for point in points])), key=lambda entry: -entry[1][1]):
        label = ax.annotate(text, (x, y), textcoords="offset points", xytext=(0, 0), color=ink, fontsize=fontsize, va="center", ha="center")
        box, here = label.get_window_extent(), Bbox([mark - pixels, mark + pixels])
        own = np.concatenate([[mark], *(places for _, places in marked if not gap(here, places))])  # all marks of its curve
        others = np.concatenate([np.empty((0, 2)), *(places for _, places in marked if gap(here, places))])
        foreign = [path for path in drawn if not path.intersects_bbox(here, filled=False)]
        fewest = np.inf
        for reach, (side, height) in itertools.product(REACHES, SIDES):
            shift = side * (box.width / 2 + reach * pixels), height * (box.height / 2 + reach * pixels)
            place = box.translated(*shift)
            way = Path([mark, np.clip(mark, place.min, place.max)])  # from the mark to the label
            on = [gap(place, path.vertices) < 3 * pixels for path in drawn] + [place.overlaps(other) for other in taken]
            across = [way.intersects_path(path, filled=False) for path in foreign] + [way.intersects_bbox(other, filled=False) for other in taken]
            across += list(distances(way.interpolated(50).vertices, others).min(axis=0) < 3 * pixels)  # other marks, which are no lines
            outside = [place.x0 < left, place.x1 > right, place.y0 < bottom, place.y1 > top]
            faults = sum(on + across + outside) + (gap(place, others) < gap(place, own))
            if faults < fewest:
                fewest, best = faults, (reach, shift, place, way)
            if not faults:
                break
        reach, shift, place, way = best
        label.set(position=np.divide(shift, pixels), in_layout=False)
        taken.append(place.padded(2 * pixels))
        if reach > 11:
            drawn.append(way.interpolated(50))
            ends = ax.transData.inverted().transform(way.vertices)
            ax.plot(*ends.T, color=ink, linewidth=0.5, alpha=0.6, zorder=1, scalex=False, scaley=False)
