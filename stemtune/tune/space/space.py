"""A search space: one YAML file that asks one question.

The blocks are `about`, `metric`, `mode`, `design`, `budget`, `resources`, `fixed`, `search`, `first` and `replicates`;
every mistake that can be seen without training is caught when the file is loaded, as one line that names the place and
the remedy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from stemtune.config import METRICS, Config, Scalar
from stemtune.errors import UserError, did_you_mean
from stemtune.tune.space.budget import (
    Budget,
    Replicates,
    Resources,
    metric_mode,
    read_budget,
    read_replicates,
    read_resources,
    setting_of,
)
from stemtune.tune.space.forms import (
    Branch,
    Choice,
    Constant,
    Dice,
    Draw,
    Form,
    Range,
    checked,
    combinations,
    combinations_count,
    read_form,
)
from stemtune.tune.space.yaml_loader import read_yaml, read_yaml_text

BLOCKS = ("about", "metric", "mode", "design", "budget", "resources", "fixed", "search", "first", "replicates")
DESIGNS = ("sampler", "grid")
_SAMPLES = 200  # configurations that are drawn at load to find mistakes that need several knobs at once


@dataclass(frozen=True)
class SearchSpace:
    """What is searched, for how long, on what, and by which measure."""

    name: str  # name of the sweep unless another is given: the file's name without its suffix
    about: str
    metric: str  # one of `stemtune.config.METRICS`
    mode: str  # whether less of it ("min") or more ("max") is better
    budget: Budget
    resources: Resources
    fixed: Mapping[str, Scalar]  # constants of every trial
    search: Mapping[str, Form]  # forms by dotted knob name
    first: tuple[Mapping[str, Scalar], ...] = ()  # trials to run before the sampler starts, as (partial) settings
    # further metrics with their modes: the sampler looks for the trials that no other beats in all of them, while
    # the champion goes by `metric` alone
    also: tuple[tuple[str, str], ...] = ()
    # "sampler": Optuna proposes; "grid": every combination of the listed values runs once, in the order written, and
    # ASHA stops none
    design: str = "sampler"
    replicates: Replicates | None = None  # the best settings again with several seeds, after the search
    text: str = field(default="", repr=False, compare=False)  # the file as it was written

    @property
    def objectives(self) -> tuple[tuple[str, str], ...]:
        """Every metric that counts, with its mode; the first decides."""
        return ((self.metric, self.mode), *self.also)

    @property
    def searched(self) -> list[str]:
        """Names of the settings that differ between trials, outermost first."""
        return list(dict.fromkeys(key for key, form, _ in walk(self.search) if not isinstance(form, Constant)))

    def suggest(self, draw: Draw) -> dict[str, Scalar]:
        """Draw one trial's settings under their dotted names, constants included."""
        flat = dict(self.fixed)
        for key, form in self.search.items():
            flat.update(self._drawn(key, form, draw, key))
        return flat

    def _drawn(self, key: str, form: Form, draw: Draw, name: str) -> dict[str, Scalar]:
        if not isinstance(form, Branch):
            return {key: form.draw(name, draw)}
        names: list[Scalar] = list(form.branches)
        label = str(draw.suggest_categorical(name, names) if len(names) > 1 else names[0])
        flat = {key: form.values[label]}
        for inner, inside in form.branches[label].items():
            flat.update(self._drawn(inner, inside, draw, self.registered(inner, label)))
        return flat

    @cached_property
    def _shared(self) -> set[str]:
        """Keys that stand with different forms in several branches: each branch registers its own."""
        forms: dict[str, list[Form]] = {}
        for key, form, _ in walk(self.search):
            forms.setdefault(key, []).append(form)
        return {key for key, all_of in forms.items() if any(form != all_of[0] for form in all_of)}

    def registered(self, key: str, branch: str) -> str:
        """Return the name under which the sampler knows `key` in `branch`, `model.width@cnn` for instance."""
        return f"{key}@{branch}" if key in self._shared else key

    def enqueued(self) -> list[dict[str, Scalar]]:
        """Return the `first` trials that lie in the space, under the sampler's names."""
        return [self.registered_point(point) for point in self.first if self._inside(point)]

    def baselines(self) -> list[dict[str, Scalar]]:
        """Return the complete settings of the `first` trials whose branch is not searched, `matched` for instance."""
        return [{**self.fixed, **point} for point in self.first if not self._inside(point)]

    def _inside(self, point: Mapping[str, Scalar]) -> bool:
        return all(
            not isinstance(form, Branch) or key not in point or str(point[key]) in form.branches
            for key, form in self.search.items()
        )

    def registered_point(self, point: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """Name the values as the sampler does; Optuna takes what is missing from the sampler."""
        named: dict[str, Scalar] = {}
        for key, form, branch in walk(self.search):
            if key in point and not isinstance(form, Constant) and _reached(point, branch):
                name = self.registered(key, branch[-1][1]) if branch else key
                named[name] = str(point[key]) if isinstance(form, Branch) else point[key]
        return named

    def with_settings(self, flat: Mapping[str, object]) -> SearchSpace:
        """Return the space with the settings in `flat` made constant, as `--set` does."""
        values = {key: checked(key, value) for key, value in flat.items()}
        search = {key: form for key, form in self.search.items() if key not in values}
        for key, value in values.items():
            form = self.search.get(key)
            if isinstance(form, Branch):
                inside = form.branches.get(str(value), {})
                search.update({inner: kind for inner, kind in inside.items() if inner not in values})
        search = {key: _without(form, values) for key, form in search.items()}
        first = tuple(
            {key: value for key, value in point.items() if key not in values}
            for point in self.first
            if all(values[key] == value for key, value in point.items() if key in values)
        )
        budget, resources = self.budget, self.resources
        if "train.epochs" in values:
            epochs = int(values["train.epochs"])
            budget = replace(budget, epochs=None, patterns=None, grace_epochs=min(budget.grace_epochs, epochs))
        if "train.workers" in values:
            resources = replace(resources, workers_given=False)
        if self.design == "grid":
            budget = replace(budget, trials=max(1, len(first)))
        changed = replace(
            self, fixed={**self.fixed, **values}, search=search, first=first, budget=budget, resources=resources
        )
        _check_whole(changed)
        return changed

    def with_budget(self, trials: int | None = None, hours: float | None = None) -> SearchSpace:
        """Return the space with other `--trials` or `--hours`; None leaves them."""
        budget = self.budget
        return replace(self, budget=replace(budget, trials=trials or budget.trials, hours=hours or budget.hours))

    def enumerated(self) -> SearchSpace:
        """Return the space with every combination planned where the trials suffice: a sampler would repeat some."""
        outside = [point for point in self.first if not self._inside(point)]
        if self.design == "grid" or combinations_count(self.search) > self.budget.trials - len(outside):
            return self
        wanted = [point for point in self.first if self._inside(point)]
        every = sorted(combinations(self.search), key=lambda at: not any(one.items() <= at.items() for one in wanted))
        return replace(self, first=(*outside, *every)).with_budget(len(outside) + len(every))

    def settings(self, flat: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """Return a trial's settings completed by what budget and resources say: epochs and workers."""
        whole = dict(flat)
        if self.budget.epochs is not None:
            whole["train.epochs"] = self.budget.epochs
        elif self.budget.patterns is not None:
            whole["train.epochs"] = self._epochs_of(int(setting_of(whole, "data.patterns_per_epoch")))
        whole.setdefault("train.workers", self.resources.workers)
        return whole

    def _epochs_of(self, patterns_per_epoch: int) -> int:
        return max(1, round((self.budget.patterns or 0) / patterns_per_epoch))

    @cached_property
    def extremes(self) -> tuple[int, int, int]:
        """Return the fewest and most workers of a trial and the most epochs."""
        workers = set(_values("train.workers", self)) or {self.resources.workers}
        epochs = {self.budget.epochs} if self.budget.epochs else set(_values("train.epochs", self))
        if self.budget.patterns:
            sizes = _values("data.patterns_per_epoch", self) or [float(setting_of({}, "data.patterns_per_epoch"))]
            epochs = {self._epochs_of(int(size)) for size in sizes}
        longest = max((int(value) for value in epochs if value), default=Config().train.epochs)
        return int(min(workers)), int(max(workers)), longest


def walk(
    forms: Mapping[str, Form], above: tuple[tuple[str, str], ...] = ()
) -> Iterator[tuple[str, Form, tuple[tuple[str, str], ...]]]:
    """Yield every (key, form, branches it stands in) of a space, outermost first."""
    for key, form in forms.items():
        yield key, form, above
        if isinstance(form, Branch):
            for label, inside in form.branches.items():
                yield from walk(inside, (*above, (key, label)))


def _without(form: Form, values: Mapping[str, Scalar]) -> Form:
    if not isinstance(form, Branch):
        return form
    branches = {
        label: {key: _without(kind, values) for key, kind in inside.items() if key not in values}
        for label, inside in form.branches.items()
    }
    return Branch(branches, form.values)


def _values(key: str, space: SearchSpace) -> list[float]:
    """Return the values, for a range its ends, that `key` can take."""
    found: list[Any] = [space.fixed[key]] if key in space.fixed else []
    for name, form, _ in walk(space.search):
        if name == key and isinstance(form, Range):
            found += [form.low, form.high]
        elif name == key and isinstance(form, Choice | Constant):
            found += form.values
    found += [point[key] for point in space.first if key in point]
    return found


def find_space(given: str | Path) -> Path:
    """Return the file of a search space: in the working folder, else in the checkout that the package lies in."""
    name, root = Path(given).expanduser(), Path(__file__).resolve().parents[3]
    places = [Path.cwd() / name, root / name]
    if name.parent == Path():
        places += [Path.cwd() / "search_spaces" / name, root / "search_spaces" / name]
    for place in places:
        if place.is_file():
            return place
    raise UserError(f"there is no search space '{name}' in {Path.cwd()}, nor in the checkout {root}")


def load_space(path: str | Path) -> SearchSpace:
    """Read and check the search space in the YAML file `path`: every mistake that can be seen before a trial runs."""
    file = Path(path).expanduser()
    content = read_yaml(file)
    try:
        return _built(file.stem, content, file.read_text(encoding="utf-8"))
    except UserError as mistake:
        raise UserError(f"{path}: {mistake}") from None


def space_from_text(text: str, name: str) -> SearchSpace:
    """Read and check a search space from YAML text."""
    return _built(name, read_yaml_text(text, name), text)


def _built(name: str, content: Mapping[Any, Any], text: str) -> SearchSpace:
    for block in content:
        if block not in BLOCKS:
            hint = did_you_mean(str(block), BLOCKS) or f"; the blocks are {', '.join(BLOCKS)}"
            raise UserError(f"there is no block called '{block}'{hint}")
    (metric, mode), *also = _objectives(content)
    design = content.get("design", DESIGNS[0])
    if design not in DESIGNS:
        raise UserError(f"`design` is {design!r}, but must be {' or '.join(DESIGNS)}")
    search = {str(key): read_form(str(key), form) for key, form in _block(content, "search").items()}
    space = SearchSpace(
        name=name,
        about=str(content.get("about") or "").strip(),
        metric=metric,
        mode=mode,
        budget=read_budget(_block(content, "budget")),
        resources=read_resources(_block(content, "resources")),
        fixed={str(key): checked(str(key), value) for key, value in _block(content, "fixed").items()},
        search=search,
        first=tuple(_points(content.get("first") or [])),
        also=tuple(also),
        design=design,
        replicates=read_replicates(_block(content, "replicates")) if content.get("replicates") else None,
        text=text,
    )
    if design == "grid":
        points = (*space.first, *combinations(search))
        space = replace(space, first=points, budget=replace(space.budget, trials=len(points)))
    _check_whole(space)
    return space


def _objectives(content: Mapping[Any, Any]) -> list[tuple[str, str]]:
    """Return the metrics with their modes; the blocks `metric` and `mode` may be lists."""
    written = content.get("metric", METRICS[0])
    metrics = written if isinstance(written, list) else [written]
    modes = content.get("mode")
    if modes is None:
        modes = [metric_mode(str(metric)) for metric in metrics]
    modes = modes if isinstance(modes, list) else [modes]
    for metric in metrics:
        if metric not in METRICS:
            hint = did_you_mean(str(metric), METRICS) or f"; it reports {', '.join(METRICS)}"
            raise UserError(f"no trial reports the metric '{metric}'{hint}")
    for mode in modes:
        if mode not in ("min", "max"):
            raise UserError(f"`mode` is {mode!r}, but must be min or max")
    if len(modes) != len(metrics) or len(set(metrics)) != len(metrics) or not metrics:
        raise UserError(f"{len(metrics)} metrics have {len(modes)} modes; name each metric once, with a mode for each")
    return list(zip(metrics, modes, strict=True))


def _block(content: Mapping[Any, Any], name: str) -> Mapping[Any, Any]:
    block = content.get(name)
    if block is None:
        return {}
    if not isinstance(block, Mapping):
        raise UserError(f"the block {name} is {block!r}, but must be settings with values")
    return block


def _points(written: object) -> list[dict[str, Scalar]]:
    if not isinstance(written, Sequence) or isinstance(written, str):
        raise UserError("the block first must be a list of settings, each - {model.name: cnn, ...}")
    points = []
    for number, point in enumerate(written, 1):
        if not isinstance(point, Mapping):
            raise UserError(f"first, trial {number} is {point!r}, but must be {{setting: value, ...}}")
        points.append({str(key): checked(str(key), value) for key, value in point.items()})
    return points


def _check_whole(space: SearchSpace) -> None:
    """Find the mistakes that need more than one line of the file."""
    _check_keys(space)
    for number, point in enumerate(space.first, 1):
        _check_point(space, point, f"first, trial {number}")
    _, most, longest = space.extremes
    if (least := space.resources.workers_least) and least > most:
        raise UserError(f"`resources.workers_least` is {least}, but a trial has {most} worker(s) at most; lower it")
    if space.budget.grace_epochs > longest:
        raise UserError(
            f"`budget.grace_epochs` is {space.budget.grace_epochs}, but must be at most the {longest} epochs of a trial"
        )
    for flat in [*samples(space, _SAMPLES), *space.baselines()]:
        config = Config.from_flat(space.settings(flat))
        for name in ("patterns", "grace_patterns"):
            if getattr(space.budget, name) and config.data.source == "store":
                raise UserError(
                    f"`budget.{name}` counts fresh patterns, but `data.source` is store, whose epochs are as long as"
                    " its training part; give epochs"
                )
        if config.train.batch_size % config.train.workers:
            raise UserError(
                f"`train.batch_size` {config.train.batch_size} does not divide among {config.train.workers}"
                " workers; choose batch sizes that are multiples of the number of workers"
            )


def _check_keys(space: SearchSpace) -> None:
    for key, _, branch in walk(space.search):
        if key in space.fixed:
            raise UserError(f"`{key}` is both fixed and searched; keep one of the two")
        outer = [parent for parent, _ in branch]
        if branch and (key in space.search or key in outer):
            raise UserError(f"`{key}` is searched in the branch '{branch[-1][1]}' and above it; keep one of the two")
    keys = {key for key, _, _ in walk(space.search)} | set(space.fixed)
    if "train.seed" in keys and space.replicates is not None:
        raise UserError("`train.seed` is given, and `replicates` gives every seed; leave it out")
    for name in ("epochs", "patterns"):
        if "train.epochs" in keys and getattr(space.budget, name) is not None:
            raise UserError(f"`train.epochs` is given, and so is `budget.{name}`; keep one of the two")
    if "train.workers" in keys and space.resources.workers_given:
        raise UserError("`train.workers` is given, and so is `resources.workers`; keep one of the two")


def _check_point(space: SearchSpace, point: Mapping[str, Scalar], place: str) -> None:
    inside = space._inside(point)
    known = {key: (form, branch) for key, form, branch in walk(space.search) if _reached(point, branch)}
    for key, value in point.items():
        if key in space.fixed:
            raise UserError(f"{place}: `{key}` is fixed, so leave it out")
        if key not in known:
            if inside:
                names = {name for name, _, _ in walk(space.search)}
                hint = did_you_mean(key, names - {key}) if key not in names else "; it belongs to another branch"
                raise UserError(f"{place}: `{key}` is not searched{hint}")
            continue
        form = known[key][0]
        if not isinstance(form, Branch) and not form.holds(value):
            raise UserError(f"{place}: `{key}` is {value!r}, but the search has {form}")


def _reached(point: Mapping[str, Scalar], branch: Iterable[tuple[str, str]]) -> bool:
    return all(str(point.get(parent)) == label for parent, label in branch)


def samples(space: SearchSpace, count: int, seed: int = 0) -> list[dict[str, Scalar]]:
    """Draw `count` settings at random, without Optuna."""
    dice = Dice(seed)
    return [space.suggest(dice) for _ in range(count)]
