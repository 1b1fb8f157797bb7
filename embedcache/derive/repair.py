"""Derived features computed again, as `verify` needs them: damaged chunks, and some rows to compare."""

from collections.abc import Sequence

from embedcache.arrays import Array, Ints
from embedcache.derive.compute import ChunkReader, OpenDerivation
from embedcache.derive.groups import read_fit, request_fingerprint
from embedcache.derive.rules import Rule, open_rule
from embedcache.derive.runs import reopen_run
from embedcache.devices import AUTO
from embedcache.encoders.open import RUN, EncoderSpec
from embedcache.errors import ItemError, UnknownNameError, pluralize
from embedcache.progress import NullProgress, Progress
from embedcache.registry import names_from
from embedcache.store.cache import Cache
from embedcache.store.feature import Feature
from embedcache.store.group import EncoderGroup, open_group
from embedcache.store.verify import Finding
from embedcache.store.writer import withdraw


def derivation_depth(cache: Cache, group: EncoderGroup) -> int:
    """Return how many derivations lie between the features of a folder and those of encoders; 0 for an encoder."""
    names = {(modality, feature.rpartition("/")[0]) for modality, feature in group.inputs}
    below = [derivation_depth(cache, open_group(cache.path, *name, cache.info)) for name in names]
    return 1 + max(below, default=0) if group.is_derived else 0


def reopen_derivation(
    cache: Cache, group: EncoderGroup, features: Sequence[str], *, device: str = AUTO
) -> OpenDerivation:
    """Open the rule and inputs of derived features again, to compute some of them as they were.

    Raises:
        SettingError: the rule or the run is custom code, and the cache is not trusted.
        UnknownNameError: the rule or an input no longer exists.
        PathError: the run no longer exists.
        CorruptError: the arrays that the rule was fitted to have changed.
    """
    spec, stored = EncoderSpec.parse(group.spec), group.fingerprint
    parameters, inputs = stored["preprocessing"], [cache.feature(*entry) for entry in group.inputs]
    view = None
    if spec.model == RUN:
        opened_run = reopen_run(cache, group, spec.options, device=device)
        parameters, rule, view = opened_run.parameters, opened_run.rule, opened_run.view
    else:
        rule = _reopen_rule(group, spec.model)
    reader = ChunkReader(cache, inputs)
    weights = rule.weights or stored["weights"]
    request = request_fingerprint(rule, inputs, parameters, weights=weights, view=view)
    fitted = read_fit(group) if rule.fit is not None else {}
    opened = {name: Feature(group, name) for name in features}
    return OpenDerivation(
        group=group,
        fingerprint={**request, **({"fit": stored["fit"]} if "fit" in stored else {})},
        rule=rule,
        reader=reader,
        parameters={**parameters, **fitted},
        outputs={name: (feature.item_shape, feature.dtype) for name, feature in opened.items()},
    )


def _reopen_rule(group: EncoderGroup, name: str) -> Rule:
    try:
        with names_from(f"{group.name}: the cache"):
            return open_rule(name)
    except UnknownNameError as error:
        raise UnknownNameError(
            f"{group.name}: the rule {name!r} that computed it cannot be imported; make its module importable, or "
            f"derive it again under another name: {error}"
        ) from error


def derive_again(opened: OpenDerivation, findings: Sequence[Finding], progress: Progress) -> str:
    """Compute damaged and missing chunks, one at a time, each withdrawn first; return a line for the report.

    Raises:
        FingerprintError: the rule, the run or an input has changed; nothing is modified.
    """
    opened.check_unchanged()
    chunks = sorted({finding.chunk for finding in findings})
    progress.start(f"repairing {opened.group.name}", len(chunks), "chunks")
    num_derived = 0
    for chunk in chunks:
        damaged = [finding.name for finding in findings if finding.chunk == chunk and finding.is_damage]
        withdraw(opened.group, chunk, damaged)
        num_derived += len(opened.run([chunk], NullProgress()))
        progress.advance(1)
    progress.finish()
    return f"{opened.group.name} ({', '.join(opened.outputs)}): derived {pluralize(num_derived, 'chunk')} again"


def derive_rows(opened: OpenDerivation, rows: Ints) -> dict[str, list[Array | ItemError]]:
    """Compute rows that have all inputs again: feature -> one array per row, in the dtype on disk."""
    return opened.compute(opened.reader.open_rows(rows), list(opened.outputs))
