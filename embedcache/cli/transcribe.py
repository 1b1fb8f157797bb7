"""embedcache transcribe"""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedcache.cli.options import Device, Json, Output, RunArgument, Srt, Vtt, with_settings
from embedcache.devices import AUTO
from embedcache.transcription.settings import TranscribeSettings

if TYPE_CHECKING:
    from embedcache.transcription.transcript import Transcript


@with_settings(settings=TranscribeSettings)
def transcribe(
    run: RunArgument,
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Recordings or videos, of any format.")],
    mouth: Annotated[
        str | None,
        typer.Option(
            metavar="X0,Y0,X1,Y1",
            help="Region of the mouth in every frame, from the upper left corner, as fractions of width and height; or "
            "all, if the frames show nothing else. Needed to read lips.",
        ),
    ] = None,
    device: Device = AUTO,
    *,
    settings: TranscribeSettings,
    as_json: Json = False,
    output: Output = None,
    srt: Srt = None,
    vtt: Vtt = None,
) -> None:
    """Transcribe speech in recordings and videos.

    The run was trained on sound, on lips or on both. Long recordings are cut at quiet places; memory does not grow with
    their length.

    Example: embedcache transcribe run/ interview.mp4 --mouth 0.35,0.55,0.65,0.8
    """
    from embedcache.cli.console import open_progress, print_line, publish
    from embedcache.errors import SettingError
    from embedcache.inference import load
    from embedcache.outputs import write_output
    from embedcache.transcription.settings import parse_mouth

    if (srt or vtt) and len(files) > 1:
        raise SettingError(
            f"{'srt' if srt else 'vtt'}: expected one recording, got {len(files)}; transcribe each alone"
        )
    region = None if mouth is None else parse_mouth(mouth)
    model, progress = load(run, kind="speech", device=device), open_progress()
    found: list[Transcript] = []
    pairs = [(file, None) for file in files]
    for transcript in model.iter_transcripts(pairs, mouth=region, settings=settings, progress=progress):
        file = files[len(found)]
        if not settings.streams and len(transcript.streams) < len(model.streams):
            progress.note(f"{file} has no frames: transcribed by its sound alone")
        if not as_json:
            print_line(transcript.text if len(files) == 1 else f"{file}: {transcript.text}")
        found.append(transcript)
    publish(
        lambda: None,
        lambda: [_to_record(file, transcript) for file, transcript in zip(files, found, strict=True)],
        as_json=as_json,
        output=output,
    )
    for path, text in ((srt, found[0].to_srt()), (vtt, found[0].to_vtt())):
        if path is not None:
            write_output(path, text.encode())


def _to_record(file: Path, transcript: "Transcript") -> dict[str, Any]:
    return {"file": str(file), **asdict(transcript), "words": [word._asdict() for word in transcript.words]}
