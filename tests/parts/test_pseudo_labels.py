from __future__ import annotations

import torch

from tailseg.parts.pseudo_labels import PseudoLabels, likeliest

PROBS = torch.tensor([[0.7, 0.2, 0.5], [0.3, 0.8, 0.5]]).reshape(1, 2, 1, 3)


def test_labels_are_the_likeliest_classes_kept_from_tau_on():
    made = PseudoLabels.of(PROBS.log(), 0.75)
    assert made.labels.tolist() == [[[0, 1, 0]]]
    assert made.kept.tolist() == [[[False, True, False]]]


def test_the_likeliest_class_is_that_of_argmax_in_either_layout():
    logits = torch.randint(-2, 3, (2, 4, 3, 5, 6), generator=torch.Generator().manual_seed(0)).float()  # many are equal
    for given in (logits, logits.contiguous(memory_format=torch.channels_last_3d).requires_grad_()):
        assert torch.equal(likeliest(given), logits.argmax(1))


def test_no_gradient_flows_through_them():
    log_probs = PROBS.log().requires_grad_()
    assert not any(part.requires_grad for part in PseudoLabels.of(log_probs, 0.5))


def test_pasting_takes_labels_and_certainty_from_inside_the_boxes():
    outside, inside = PseudoLabels.of(PROBS.log(), 0.6), PseudoLabels.of(PROBS.flip(1).log(), 0.75)
    mixed = outside.paste(inside, torch.tensor([[[True, False, False]]]))
    assert mixed.labels.tolist() == [[[1, 1, 0]]]
    assert mixed.kept.tolist() == [[[False, True, False]]]
