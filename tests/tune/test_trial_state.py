"""What travels from a trial to Tune: little that Tune counts, and every figure for the records."""

from __future__ import annotations

import json

from stemtune.config import METRICS
from stemtune.tune.run.trial_state import packed, unpacked


def test_tune_gets_few_numbers_and_the_records_all() -> None:
    report = {**{metric: number + 0.5 for number, metric in enumerate(METRICS)}, "time/device_s": 3.0, "epoch": 2}
    report |= {"placement_group": "ab12", "earlier": [{"epoch": 1}]}
    sent = packed(report, ["val/ece"])
    numbers = {key for key, value in sent.items() if isinstance(value, int | float)}
    assert numbers == {"val/ece", "epoch"}
    assert (sent["placement_group"], sent["earlier"]) == ("ab12", [{"epoch": 1}])
    again = unpacked({**sent, "training_iteration": 2, "done": False})
    assert {key: again[key] for key in report} == report
    assert again["done"] is False
    assert json.loads(json.dumps(sent)) == sent
    assert unpacked({"val/loss": 1.0}) == {"val/loss": 1.0}  # a report that was not packed
