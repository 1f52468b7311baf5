"""Files that a space names are found from where the sweep starts, for its trials run elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from stemtune.errors import UserError
from stemtune.tune.run.manifest import absolute, named_files
from stemtune.tune.space.space import space_from_text

TEXT = """\
fixed: {data.validation_store: truth.h5, data.cif: linio2}
search:
  data.store: [one.h5, two.h5]
  optim.lr: {log: [1.0e-4, 1.0e-2]}
  model.name:
    one_of:
      cnn: {model.pretrained: [false, weights.pth]}
      matched: {}
first:
  - {model.name: matched, data.store: two.h5}
"""


def test_paths_are_absolute_wherever_they_stand(tmp_path: Path) -> None:
    names = ("truth.h5", "one.h5", "two.h5", "weights.pth")
    for name in names:
        (tmp_path / name).touch()
    made = absolute(space_from_text(TEXT, "test"), tmp_path)
    assert made.fixed["data.validation_store"] == str(tmp_path / "truth.h5")
    assert made.fixed["data.cif"] == "linio2"
    assert made.first[0]["data.store"] == str(tmp_path / "two.h5")
    assert str(tmp_path / "one.h5") in str(made.search["data.store"])
    branch = made.search["model.name"].branches["cnn"]["model.pretrained"]  # type: ignore[union-attr]
    assert str(tmp_path / "weights.pth") in str(branch) and "alse" in str(branch)
    assert named_files(made) == sorted(str(tmp_path / name) for name in names)
    assert absolute(made, Path("/elsewhere")) == made


@pytest.mark.parametrize("missing", ["truth.h5", "two.h5", "weights.pth"])
def test_a_missing_file_is_named(missing: str, tmp_path: Path) -> None:
    for name in ("truth.h5", "one.h5", "two.h5", "weights.pth"):
        if name != missing:
            (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"'{missing}' does not exist"):
        absolute(space_from_text(TEXT, "test"), tmp_path)
