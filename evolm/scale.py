"""How large and how long a promotion is: as asked for, or as it was begun."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evolm.errors import UsageError
from evolm.run import Run
from fitness.trial import Trial
from search_spaces.genome import Values
from trainer.recipe import Recipe
from trainer.scaling import scaled, scaling_params

LONGER = 4
"""Without --tokens, a promoted recipe of the search's own size is trained on so many times the tokens of the last
rung."""

FILE = "scale.json"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much larger than in the search the models of a promotion are, and by which rule. `tuned_at` are the tokens of
    the search's last rung, that the laws of horizon count from."""

    width: int
    depth: int
    tuned_at: int
    parameterization: str = "completep"

    @property
    def words(self) -> str:
        """For people."""
        return f"{self.width} times the width and {self.depth} times the depth"


def scale_of(run: Run, folder: Path, width: int | None, depth: int | None) -> Scale | None:
    """How much larger to train: as asked for, or as in the promotion that was begun here. Raises UsageError when the
    two differ."""
    asked = None
    if (width or 1, depth or 1) != (1, 1):
        asked = Scale(width=width or 1, depth=depth or 1, tuned_at=run.settings.fidelity.rungs[-1])
    if _begun(folder) is None:
        return asked
    file = folder / FILE
    begun = Scale(**json.loads(file.read_text())) if file.is_file() else None
    if (width is None and depth is None) or asked == begun:
        return begun
    here, other = (f"at {scale.words}" if scale else "at the size of the search" for scale in (begun, asked))
    raise UsageError(
        f"{folder}: holds a promotion {here}, not {other}; leave --width and --depth out to go on with it, or move the "
        "folder away to begin another"
    )


def _begun(folder: Path) -> dict[str, Any] | None:
    """What winner or baseline, whichever was first, was begun with; None where neither was."""
    from trainer.stages.pretrain import Stage

    return Stage(folder / "pretrain").begun() or Stage(folder / "baseline").begun()


def keep_scale(folder: Path, scale: Scale | None) -> None:
    """Write down how large the promotion that begins here is."""
    from trainer.stages.pretrain import write_json

    if scale is None:
        (folder / FILE).unlink(missing_ok=True)
    else:
        write_json(folder / FILE, asdict(scale))


def length_of(run: Run, trial: Trial, folder: Path, tokens: int | None, scale: Scale | None) -> int:
    """How many tokens to train on: those asked for, or those of the promotion that was begun here. Raises UsageError
    when the two differ."""
    begun = _begun(folder)
    if begun is None:
        return tokens or _usual_length(run, trial, scale)
    if tokens not in (None, begun["tokens"]):
        raise UsageError(
            f"{folder}: holds a promotion on {begun['tokens']:,} tokens, not {tokens:,}; leave --tokens out to go on "
            "with it, or move the folder away to begin another"
        )
    return int(begun["tokens"])


def _usual_length(run: Run, trial: Trial, scale: Scale | None) -> int:
    """Tokens of a promotion whose length nobody asked for: more in a model that is larger, as many for each parameter
    as in the search, because laws of horizon hold along that line."""
    if scale is None:
        return LONGER * run.settings.fidelity.rungs[-1]
    before, after = Recipe.model_validate(trial.genome), Recipe.model_validate(at_scale(trial.genome, scale, None))
    return round(scale.tuned_at * scaling_params(after) / scaling_params(before))


def at_scale(genome: Values, scale: Scale | None, tokens: int | None) -> Values:
    """The recipe of a genome at the size and for the tokens of a promotion. Raises UsageError when there is none."""
    if scale is None:
        return genome
    recipe = Recipe.model_validate(genome)
    horizon = {} if tokens is None else {"tokens": tokens, "tuned_at": scale.tuned_at}
    try:
        larger = scaled(recipe, width=scale.width, depth=scale.depth, **horizon)
    except ValueError as error:
        raise UsageError(f"no recipe is {scale.words} of this one: {error}") from None
    return larger.model_dump(mode="json", exclude_none=True)
