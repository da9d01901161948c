"""PE-Dist's loss."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import numbers

from pyra_lab import distillation


@pytest.mark.parametrize("weight, temperature", [(1.0, 1.0), (0.3, 4.0), (2.0, 0.5)])
def test_distillation_loss_is_the_formula(weight, temperature):
    student, teacher, labels = numbers(4, 5, seed=1), 3 * numbers(4, 5, seed=2), [0, 3, 4, 3]

    def softmax(z, t):
        e = [math.exp(value / t) for value in z]
        return [value / sum(e) for value in e]

    expected = 0
    for s, t, y in zip(student.tolist(), teacher.tolist(), labels):
        p, q = softmax(t, temperature), softmax(s, temperature)
        kl = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q))
        expected += (-math.log(softmax(s, 1)[y]) + weight * temperature**2 * kl) / 4
    loss = distillation.distillation_loss(student, teacher, torch.tensor(labels), weight, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_teacher_that_agrees_adds_nothing():
    """Equal logits, or logits that differ by a constant: cross-entropy alone is left."""
    student, labels = numbers(4, 5), torch.arange(4)
    for teacher in (student, student + 7):
        loss = distillation.distillation_loss(student, teacher, labels, weight=100.0, temperature=3.0)
        torch.testing.assert_close(loss, F.cross_entropy(student, labels), rtol=1e-4, atol=1e-4)


def test_distillation_teaches_the_student_alone():
    student, teacher, labels = numbers(4, 5).requires_grad_(), numbers(4, 5, seed=1).requires_grad_(), torch.arange(4)
    distillation.distillation_loss(student, teacher, labels).backward()
    assert teacher.grad is None
    expected = (2 * student.softmax(1) - F.one_hot(labels, 5) - teacher.softmax(1)) / 4
    torch.testing.assert_close(student.grad, expected.detach())


@pytest.mark.parametrize("call, message", [
    (lambda z, y: distillation.distillation_loss(z, z[:, :4], y), r"must agree on the logits' shape, not \(4, 5\) and \(4, 4\)"),
    (lambda z, y: distillation.distillation_loss(z, z, y, temperature=0), "temperature must be greater than 0, not 0"),
])
def test_distillation_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(numbers(4, 5), torch.arange(4))
