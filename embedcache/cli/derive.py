"""embedcache derive"""

from embedcache.cli.options import CacheArgument, Json, Output, with_settings
from embedcache.derive.settings import DeriveSettings


@with_settings(settings=DeriveSettings)
def derive(cache: CacheArgument, as_json: Json = False, output: Output = None, *, settings: DeriveSettings) -> None:
    """Compute features from cached ones, by a run or a rule.

    They are features of the cache like any other. Run the same command again to resume an interrupted derivation, or
    after new samples were extracted.

    Example: embedcache derive cache/ --run run/ --run-output projected
    """
    from embedcache.cli.console import open_progress, print_line, publish, to_plain
    from embedcache.derive.derive import derive_with_settings

    reports = derive_with_settings(cache, settings, progress=open_progress())

    def show() -> None:
        for report in reports:
            print_line(report.line())

    publish(show, lambda: [to_plain(report) for report in reports], as_json=as_json, output=output)
