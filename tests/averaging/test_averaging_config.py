"""Options of `averaging.*` that do not go together are refused, each with what would."""

from typing import Any

import pytest
from pydantic import ValidationError

from averaging.config import Averaging

REQUIRED: dict[str, Any] = {"target_batch_size": 256, "target_group_size": 4}


@pytest.mark.parametrize(("options", "expected"), [
    ({"local_steps": 8}, "averaging.local_steps with strategy local_sgd or diloco only"),
    ({"strategy": "gossip", "overlap": True}, "averaging.overlap with strategy collaborative only"),
    ({"strategy": "local_sgd", "robust": "centered_clip"}, "averaging.robust with strategy collaborative only"),
    ({"topology": "ring"}, "averaging.topology with strategy gossip only"),
    ({"strategy": "diloco", "initial_steps": 3}, "averaging.initial_steps with strategy local_sgd only"),
    ({"strategy": "diloco", "local_steps": 4, "delay": 4}, "averaging.delay below averaging.local_steps = 4"),
    ({"strategy": "diloco", "compression": "uniform8bit"}, "blockwise8bit with strategy diloco"),
    ({"averaging_timeout": 2.0, "next_chunk_timeout": 1.0}, "averaging_timeout above 2 x next_chunk_timeout = 2 s"),
    ({"total_steps_in_epoch": 4, "batch_size_for_tracking": 32}, "target_batch_size = 128"),
])
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        Averaging(**REQUIRED | options)


@pytest.mark.parametrize("options", [
    {"strategy": "local_sgd", "local_steps": 8, "initial_steps": 100, "initial_step_method": "multiple_processes"},
    {"strategy": "diloco", "local_steps": 8, "fragments": 2, "delay": 3, "alpha": 0.5, "compression": "blockwise8bit"},
    {"strategy": "gossip", "topology": "alternating-exp-ring"},
    {"overlap": True, "robust": "centered_clip", "clip_radius": 2.0, "compression": "fp16"},
])
def test_options_of_a_strategy_are_taken_with_it(options: dict[str, Any]) -> None:
    taken = Averaging(**REQUIRED | options)
    assert {name: getattr(taken, name) for name in options} == options


def test_every_option_given_by_its_default_is_no_option_of_another_strategy() -> None:
    document = Averaging(**REQUIRED).model_dump()
    assert Averaging(**document).model_dump() == document
