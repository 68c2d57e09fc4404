"""How a space is searched: the part of a space file beside the recipe, and the one definition of what it may say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from evolm.algorithms.fidelity import DEFAULT_ETA, Fidelity
from trainer.extras import EngineName
from trainer.metrics_log import MAX_BYTES
from trainer.recipe import Section
from trainer.sinks import unknown_sink

Direction = Literal["min", "max"]

DEFAULT_OBJECTIVES: dict[str, Direction] = {"bits_per_byte": "min", "params": "min"}


def _whole(value: Any) -> Any:
    """1e6 as the whole number that its writer means."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, Field(gt=0), BeforeValidator(_whole)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Weight = Annotated[float, Field(ge=0)]


class FidelitySection(Section):
    """How long trials are trained: on the first rung all of them, on each further one the better part."""

    tokens: Count | list[Count] = Field(
        description="training tokens: one number, or the first and the last rung, or all rungs"
    )
    eta: int = Field(DEFAULT_ETA, ge=2, description="of so many trials on a rung, one goes on to the next")

    @field_validator("tokens")
    @classmethod
    def _grow(cls, tokens: int | list[int]) -> int | list[int]:
        if isinstance(tokens, list) and (not tokens or any(low >= high for low, high in pairwise(tokens))):
            raise ValueError(f"must grow from rung to rung, is {tokens}")
        return tokens


class BudgetSection(Section):
    """When a search ends; `evolm resume` goes on with a larger budget."""

    trials: Count = Field(50, description="genomes that are tried")
    hours: float | None = Field(None, ge=0, description="hours after which nothing more is launched")


class SearchSection(Section):
    """Who proposes."""

    algorithm: str = Field("auto", description="`auto`, `nsga2`, `random`, or a plug-in's name")
    seed: Seed = Field(0, description="seed of proposals, initial weights and data order")


class ResourcesSection(Section):
    """What one trial gets."""

    cpus: float = Field(1, ge=0, description="processor cores, in steps of 0.0001; as many threads")
    gpus: float = Field(0, ge=0, description="accelerators, or the share of one in steps of 0.0001")
    memory: Count | None = Field(
        None, description="memory of all its processes together, such as 8GiB; an equal share of its node when absent"
    )
    max_concurrent: Count | None = Field(None, description="trials side by side; as many as fit when absent")
    processes: Count | None = Field(
        None, description="processes that train one trial together; one for each accelerator when absent"
    )
    engine: EngineName | None = Field(
        None, description="how they share a model; single for one process, ddp for several when absent"
    )

    @field_validator("cpus", "gpus")
    @classmethod
    def _countable(cls, amount: float, info: ValidationInfo) -> float:
        if abs(amount * 10_000 - round(amount * 10_000)) > 1e-6:
            raise ValueError(f"must be a multiple of 0.0001, is {amount}")
        if info.field_name == "gpus" and amount > 1 and amount != int(amount):
            raise ValueError(f"must be a whole number above 1, is {amount}")
        return amount

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        processes, several = self.processes, (self.processes or self.gpus) > 1
        if processes is not None and self.gpus > 0 and processes != max(1, self.gpus):
            raise ValueError(f"processes = {processes} must be one for each of gpus = {self.gpus:g}")
        if self.engine == "single" and several:
            raise ValueError("engine single trains in one process; take ddp, fsdp or deepspeed")
        if self.engine not in (None, "single") and not several:
            raise ValueError(f"engine {self.engine} is for several processes: give processes, or gpus above 1")
        return self


class TrialSection(Section):
    """How a trial is run: how long it may take, and by whom, where it is not evolm's own trainer."""

    command: list[str] | None = Field(
        None,
        min_length=1,
        description="program and arguments that train one trial; its recipe is then free of evolm's keys",
    )
    hours: float | None = Field(None, gt=0, description="how long one launch of a trial may take (reason `timeout`)")
    silent_minutes: float = Field(30, gt=0, description="how long it may go on without any progress (reason `timeout`)")


class CheckpointsSection(Section):
    """What is kept of trials on the disk. Those that can no longer be promoted keep nothing."""

    minutes: float = Field(5, gt=0, description="a running trial saves so often")
    keep_last: int = Field(1, ge=1, le=9, description="saves of a running trial that are kept, should one be damaged")
    keep_best: int = Field(
        0, ge=0, description="complete trials, best by the first objective, whose final weights are kept"
    )
    max_bytes: Count | None = Field(
        None,
        description="of all checkpoints of the run, such as 50GiB; half of what is free on its disk when absent",
    )


class TelemetrySection(Section):
    """What is written down while trials train."""

    sinks: list[str] = Field(
        [],
        description="where the lines of metrics.jsonl go besides: `tensorboard`, `mlflow`, `wandb` or a plug-in's name",
    )
    max_bytes: Annotated[int, Field(ge=2**16), BeforeValidator(_whole)] = Field(
        MAX_BYTES, description="of each metrics.jsonl; beyond it every second line is left out"
    )

    @field_validator("sinks")
    @classmethod
    def _known(cls, sinks: list[str]) -> list[str]:
        if words := unknown_sink(sinks):
            raise ValueError(words)
        if len(set(sinks)) < len(sinks):
            raise ValueError("names a sink twice")
        return sinks


class SettingsSchema(Section):
    """Everything in a space file that is neither recipe nor header."""

    constraints: list[str] = Field([], description="conditions that every genome meets, as expressions")
    baselines: list[dict[str, Any]] = Field(
        [], description="known recipes, or parts of them (the rest is the baseline's), that are tried first"
    )
    target: dict[str, Weight] | None = Field(
        None, description="weights of the domains in `bits_per_byte`; equal when absent"
    )
    objectives: dict[str, Direction] = Field(DEFAULT_OBJECTIVES, description="what is made small (min) or large (max)")
    fidelity: FidelitySection | None = None
    budget: BudgetSection = BudgetSection()
    search: SearchSection = SearchSection()
    resources: ResourcesSection = ResourcesSection()
    trial: TrialSection = TrialSection()
    checkpoints: CheckpointsSection = CheckpointsSection()
    telemetry: TelemetrySection = TelemetrySection()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a space is searched. `hours` bounds the time of a search, `trials` the genomes that are tried; `trial_hours`
    and `silent_minutes` bound one launch of a trial, `memory` its bytes."""

    objectives: dict[str, str]
    target: dict[str, float] | None
    fidelity: Fidelity
    trials: int
    hours: float | None
    algorithm: str
    seed: int
    cpus: float
    gpus: float
    max_concurrent: int | None
    memory: int | None = None
    command: tuple[str, ...] | None = None
    trial_hours: float | None = None
    silent_minutes: float = 30
    checkpoint_minutes: float = 5
    keep_last: int = 1
    keep_best: int = 0
    max_bytes: int | None = None
    sinks: tuple[str, ...] = ()
    log_bytes: int = MAX_BYTES
    processes: int | None = None
    engine: EngineName | None = None

    @property
    def ranks(self) -> int:
        """Processes that train one trial together."""
        return self.processes or max(1, int(self.gpus))

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, the way a run keeps them."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return values | {
            "fidelity": {"tokens": list(self.fidelity.rungs), "eta": self.fidelity.eta},
            "command": None if self.command is None else list(self.command),
            "sinks": list(self.sinks),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """The inverse of `as_dict`."""
        ladder, command = values["fidelity"], values.get("command")
        return cls(
            **{
                **values,
                "fidelity": Fidelity(tuple(ladder["tokens"]), ladder["eta"]),
                "command": None if command is None else tuple(command),
                "sinks": tuple(values.get("sinks", ())),
            }
        )

    @classmethod
    def of(cls, given: SettingsSchema, fidelity: Fidelity) -> Settings:
        """The settings of a file whose sections were read."""
        return cls(
            objectives=dict(given.objectives),
            target=given.target,
            fidelity=fidelity,
            **given.budget.model_dump(),
            **given.search.model_dump(),
            **given.resources.model_dump(),
            command=None if given.trial.command is None else tuple(given.trial.command),
            trial_hours=given.trial.hours,
            silent_minutes=given.trial.silent_minutes,
            checkpoint_minutes=given.checkpoints.minutes,
            **given.checkpoints.model_dump(exclude={"minutes"}),
            sinks=tuple(given.telemetry.sinks),
            log_bytes=given.telemetry.max_bytes,
        )


def with_overrides(settings: Settings, **given: Any) -> Settings:
    """The settings with those that the command line names (the others are None)."""
    return replace(settings, **{key: value for key, value in given.items() if value is not None})
