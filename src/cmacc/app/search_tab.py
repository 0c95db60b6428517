"""The tab of the search: the fields of a query on the left, the results beside them."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from cmacc.app.library import Member
from cmacc.app.listing import IndexFiles
from cmacc.app.opened import Opened
from cmacc.app.queries import MOST_RESULTS, Asked, AskError, Picked, Uploaded, Words, ask
from cmacc.app.rendering import message, without_paths
from cmacc.app.results import SCRIPT, clock, found_html, seconds_of
from cmacc.clips import MediaError
from cmacc.pretraining.clip_encoder import EncoderError, Modality
from cmacc.search import Index, SearchError
from cmacc.search.index import Where

_LISTED = 50
_FILE_TYPES = ["video", "audio", "image"]
_WITH = {"A file of yours": "file", "A recording": "recording", "A file of this index": "index", "Words": "words"}
_BY: dict[str, Modality | None] = {"Picture and sound": None, "Its picture alone": "video", "Its sound alone": "audio"}
_INTO: dict[str, Where] = {"Pictures and sounds": "both", "Pictures": "video", "Sounds": "audio"}
_WELCOME = "Choose what to search with, and press Search. The moments that fit best are shown here."
_log = logging.getLogger(__name__)


def search_tab(opened: Opened, index: Index) -> None:
    """Add the inputs of a search, and its results, to the page."""
    files = IndexFiles(index.table)
    kinds = [name for name in _WITH if name != "Words" or index.table.description.text_sizes]
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            kind = gr.Radio([(name, _WITH[name]) for name in kinds], value="file", label="Search with")
            upload = gr.File(label="A video, a sound or a picture", file_types=_FILE_TYPES, type="filepath", height=160)
            recording = gr.Audio(label="Recording", sources=["microphone"], type="filepath", visible=False)
            with gr.Group(visible=False) as picking:
                part_of_name = gr.Textbox(label="Part of the file's name", placeholder="Type to find a file")
                picked = gr.Dropdown(label="File of this index", choices=[], interactive=True, filterable=False)
            text = gr.Textbox(label="Words", placeholder="a dog barks", visible=False, max_length=500)
            button = gr.Button("Search", variant="primary")
            with gr.Accordion("Options", open=False):
                with gr.Row():
                    start = gr.Textbox(label="From", placeholder="0:00", max_length=12, min_width=80)
                    end = gr.Textbox(label="To", placeholder="the end", max_length=12, min_width=80)
                by = gr.Radio(list(_BY), value=next(iter(_BY)), label="Search by")
                into = gr.Radio(list(_INTO), value=next(iter(_INTO)), label="Find in")
                known = files.labels()
                labels = gr.Dropdown(
                    label="Only these labels", choices=known, multiselect=True, value=[], visible=bool(known)
                )
                name = gr.Textbox(label="Only files whose name contains", max_length=200)
                top = gr.Slider(1, MOST_RESULTS, value=10, step=1, label="Most results")
                nearest = gr.Checkbox(label="Show the nearest, however bad")
        with gr.Column(scale=3, min_width=300):
            results = gr.HTML(message(_WELCOME), js_on_load=SCRIPT, elem_id="results")

    def shown(chosen: str) -> list[Any]:
        visible = [chosen == one for one in _WITH.values()]
        return [gr.update(visible=one) for one in visible]

    def listed(typed: str | None) -> Any:
        found, count = files.matching(typed or "", _LISTED)
        more = f", the first {_LISTED} of {count:,} are listed" if count > _LISTED else ""
        choices = [(one.name, _id_of(opened, one)) for one in found]
        value = choices[0][1] if choices and typed else None
        return gr.update(choices=choices, value=value, label=f"File of this index ({count:,} fit{more})")

    def searched(
        kind: str,
        upload: str | None,
        recording: str | None,
        picked: str | None,
        text: str | None,  # empty fields are None
        start: str | None,
        end: str | None,
        *options: Any,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (gradio finds it by its default)
    ) -> str:
        def asked() -> Asked:
            query = _query(opened, kind, upload, recording, picked, text)
            return Asked(query, seconds_of(start), seconds_of(end), **_options(*options))

        progress(0.1, desc="Searching")
        return _answered(opened, index, asked)

    def again(event: gr.EventData, *options: Any) -> list[Any]:
        """The moment of a result becomes the query."""
        try:
            name, begin, stop = str(event.id), float(event.start), float(event.end)
            query = _picked(opened, name)
            times = clock(begin), clock(stop)
        except (AskError, AttributeError, ArithmeticError, ValueError, TypeError) as error:
            return [gr.skip()] * 4 + [_fault(error)]
        html = _answered(opened, index, lambda: Asked(query, begin, stop, **_options(*options)))
        listed_now = gr.update(choices=[(query.name, name)], value=name)
        return ["index", listed_now, times[0], times[1], html]

    options = [by, into, labels, name, top, nearest]
    fields = [kind, upload, recording, picked, text, start, end, *options]
    found = {"outputs": results, "show_progress_on": results, "concurrency_id": "search"}
    # The part of one file has no meaning for another.
    for other_query in (kind.input, upload.change, recording.change, picked.input):
        other_query(None, outputs=[start, end], js="() => ['', '']", queue=False)
    kind.change(shown, kind, [upload, recording, picking, text], queue=False, show_progress="hidden")
    # Not on a change by `again`, which has chosen the file.
    kind.input(listed, part_of_name, picked, queue=False)
    part_of_name.change(listed, part_of_name, picked, trigger_mode="always_last", queue=False)
    gr.on([button.click, text.submit, name.submit, start.submit, end.submit], searched, fields, **found)
    results.again(again, options, **found | {"outputs": [kind, picked, start, end, results]})


def _options(
    by: str, into: str, labels: list[str] | None, name: str | None, top: int | float, nearest: bool
) -> dict[str, Any]:
    """Fields of `Asked` from what the page sends."""
    return {
        "by": _BY[by],
        "into": _INTO[into],
        "labels": tuple(labels or ()),
        "name_contains": (name or "").strip(),
        "top": int(top),
        "nearest": bool(nearest),
    }


def _answered(opened: Opened, index: Index, asked: Callable[[], Asked]) -> str:
    """The answer as HTML, or what is wrong with the question. Nothing else may come back: a stack tells of paths."""
    try:
        question = asked()
        return found_html(opened, question, ask(index, question, opened.longest_query_seconds))
    except (AskError, SearchError, EncoderError, MediaError) as error:
        _log.info("search refused: %s", error)
        return _fault(error)
    except Exception:
        _log.exception("search failed")
        return message("The search failed; the log of the server says why.", is_fault=True)


def _query(
    opened: Opened, kind: str, upload: str | None, recording: str | None, picked: str | None, text: str | None
) -> Uploaded | Picked | Words:
    if kind == "words":
        return Words((text or "").strip())
    if kind == "index":
        if not picked:
            raise AskError("Choose a file of the index to search with.")
        return _picked(opened, picked)
    path = upload if kind == "file" else recording
    if not path:
        raise AskError("Choose a file to search with." if kind == "file" else "Record something to search with.")
    real = Path(path).resolve()
    # A request could name any path of this machine.
    if not real.is_relative_to(Path(get_upload_folder()).resolve()) or not real.is_file():
        raise AskError("The file must have been uploaded to this page; choose it again.")
    return Uploaded(real)


def _picked(opened: Opened, name: str) -> Picked:
    assert opened.index is not None
    try:
        source = opened.library.named(name)
    except KeyError:
        raise AskError("Choose a file of the index to search with.") from None
    path, key = (source.shard, source.key) if isinstance(source, Member) else (str(source), None)
    return Picked(path.removeprefix(f"{opened.index.table.description.root}/"), key)


def _id_of(opened: Opened, file: Picked) -> str:
    assert opened.index is not None
    return opened.library.id_of_row(f"{opened.index.table.description.root}/{file.path}", file.key)


def _fault(error: Exception) -> str:
    return message(without_paths(error).removeprefix("query "), is_fault=True)
