"""Settings of `embedcache derive`. Nothing heavy is imported here, so that the command line starts quickly."""

import json
from pathlib import Path
from typing import Any, Literal

from embedcache.errors import SettingError
from embedcache.processes import device_setting
from embedcache.settings import Settings, setting

DTYPES = ("float16", "float32", "int16", "int32", "int64")
"""Data types of derived features; integers are labels, with -1 where a value is missing."""


class DeriveSettings(Settings):
    """Settings of a derivation: the output of a run, or a rule and its inputs."""

    run: Path | None = setting(None, "Apply this run to the features that it was trained on.", metavar="RUN")
    run_output: str | None = setting(
        None,
        "Output of the run: projected, unit vectors in the shared space, of an aligned pair, or a module's own.",
        metavar="NAME",
        default_text="projected",
    )
    modality: str | None = setting(
        None,
        "Modality whose features the run is applied to.",
        metavar="NAME",
        default_text="all for which the run has the output",
    )
    views: tuple[str, ...] = setting(
        (),
        "Read this view of the run's features, such as flip or babble-5dB, and store the output in a separate folder; "
        "plain is the features themselves. May be repeated.",
        flat_name="view",
        metavar="VIEW",
        commas="split specs",
        default_text="plain",
    )
    rule: str | None = setting(
        None,
        "Apply this rule: concat, mean, pca, standardize, … or module:attribute.",
        metavar="NAME",
    )
    inputs: tuple[str, ...] = setting(
        (),
        "Feature that the rule reads, such as image=dinov2/cls. May be repeated.",
        flat_name="input",
        metavar="MODALITY=NAME",
    )
    parameters: tuple[str, ...] = setting(
        (), "Parameter of the rule, such as width=64. May be repeated.", flat_name="parameter", metavar="NAME=VALUE"
    )
    fit_split: Path | None = setting(
        None, "Fit the rule on the training part of a run: its split.parquet.", default_text="all items"
    )
    name: str | None = setting(
        None, "Name of the derived features' folder in the cache.", default_text="RUN-OUTPUT, or the rule"
    )
    dtype: Literal["float16", "float32", "int16", "int32", "int64"] = setting(
        "float16", "Data type of the stored features."
    )
    device: str = device_setting()

    def model_post_init(self, _context: object) -> None:
        if (self.run is None) == (self.rule is None):
            got = "neither" if self.run is None else "both"
            raise SettingError(f"rule: expected either --run or --rule, got {got}")

        # An option of the other way would be ignored silently.
        excluded: dict[str, object]
        if self.run is None:
            owner = "--run"
            excluded = {"run_output": self.run_output, "modality": self.modality, "view": self.views}
        else:
            owner = "--rule"
            excluded = {"input": self.inputs, "parameter": self.parameters, "fit_split": self.fit_split}
        for name, value in excluded.items():
            if value:
                raise SettingError(f"{name}: expected with {owner} only; omit it")

    @property
    def input_features(self) -> list[tuple[str, str]]:
        """Modality and name of each input."""
        return [_split_pair("input", text, "MODALITY=NAME, such as image=dinov2/cls") for text in self.inputs]

    @property
    def parameter_values(self) -> dict[str, Any]:
        """Parameters of the rule. A value that is JSON, such as 64 or true, is read as JSON, any other as a string."""
        values = {}
        for text in self.parameters:
            name, value = _split_pair("parameter", text, "NAME=VALUE, such as width=64")
            values[name] = _parse(value)
        return values


def _split_pair(option: str, text: str, expected: str) -> tuple[str, str]:
    name, equals, value = map(str.strip, text.partition("="))
    if not (name and equals and value):
        raise SettingError(f"{option}: expected {expected}, got {text!r}")
    return name, value


def _parse(value: str) -> Any:
    # Names need no quotes, unlike in JSON.
    try:
        return json.loads(value)
    except ValueError:
        return value
