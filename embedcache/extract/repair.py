"""Making damaged chunks again, and nothing else."""

from collections import defaultdict
from collections.abc import Sequence

from embedcache.cache.cache import Cache
from embedcache.cache.group import open_group
from embedcache.cache.verify import Finding
from embedcache.cache.writing import withdraw
from embedcache.errors import CorruptError
from embedcache.extract.claim import claim_one
from embedcache.extract.reopen import check_unchanged, reopen_target
from embedcache.extract.worker import encode_chunks
from embedcache.progress import Progress, Silent
from embedcache.sources import reopen_source


def repair(
    cache: Cache, findings: Sequence[Finding], *, device: str = "cpu", progress: Progress | None = None
) -> list[str]:
    """Withdraw the damaged features of each chunk, and encode those chunks again with what made them.

    Args:
        cache: the cache; its source and encoders must be there still.
        findings: from `verify`; those that are no damage, or cannot be mended so, are left alone.
        device: a torch device.
        progress: told about items.

    Returns:
        One line an encoder.

    Raises:
        FingerprintError: an encoder is not the same any more; nothing of it is touched.
        CorruptError: a table is damaged, so that nobody knows which rows the chunks hold; nothing is touched.
    """
    tables = [finding for finding in findings if finding.is_damage and not finding.encoder]
    if tables:
        raise CorruptError(f"nothing is repaired while {tables[0].line()}")
    progress = progress or Silent()
    source = reopen_source(cache.info.source)
    damaged: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        if finding.is_damage and finding.can_repair:
            damaged[finding.modality, finding.encoder].append(finding)
    lines = []
    for (modality, encoder), some in damaged.items():
        group = open_group(cache.path, modality, encoder, cache.info)
        target = reopen_target(group, sorted({finding.name for finding in some}), device=device)
        check_unchanged(target)
        for finding in some:
            withdraw(group, finding.chunk, [finding.name])
        chunks = sorted({finding.chunk for finding in some})
        rows = [cache.info.chunk_rows(modality, chunk) for chunk in chunks]
        progress.start(f"repairing {encoder}", sum(row.stop - row.start for row in rows), f"{modality}s")
        works = (work for chunk in chunks if (work := claim_one(target, chunk)).targets)
        encode_chunks(cache, source, modality, works, progress)
        progress.finish()
        lines.append(f"{encoder} ({', '.join(target.features)}): made {len(chunks):,} chunks again")
    return lines
