"""PE-Dist: a smaller model learns a task from its labels and from the logits of a larger, adapted one."""

import torch.nn.functional as F


def distillation_loss(student_logits, teacher_logits, labels, weight=1.0, temperature=1.0):
    """Eq. (2) of the supplement, L_task + L_dist: cross-entropy(z_s, y) + weight T^2 KL(softmax(z_t / T) || softmax(z_s / T)).

    student_logits, teacher_logits: (b, classes), in one order of classes; labels: (b,) int64; T: temperature. Both terms
    are means over the batch. No gradient reaches the teacher. Raises ValueError.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"student and teacher must agree on the logits' shape, not {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be greater than 0, not {temperature!r}")
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=-1)
    kl = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return F.cross_entropy(student_logits, labels) + weight * temperature**2 * kl
