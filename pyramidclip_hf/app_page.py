# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The page of `pyramidclip app`: its parts, how it is served, and what of the world it may reach (nothing).

Gradio (extra `app`) makes the page; what is answered is `app`'s. Nothing is written outside of a temporary folder.
"""

import argparse
import html
import os
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

from .app import (
    MAX_HITS,
    MAX_LABELS,
    Examples,
    Regions,
    TriedModel,
    Why,
    checked_text,
    distribute_embeddings,
    labels_of,
    open_picture,
    read_regions,
    titles_of,
    wall,
)
from .files import read_utf8
from .loading import choose_device, load_model
from .picture_files import find_pictures

MAX_UPLOAD_BYTES = 20 << 20
# Questions that wait; who comes then is told to try again.
_MAX_WAITING = 32
# Seconds between two looks at the temporary folder, and the age from which on a file there is removed.
_CLEANING = (600, 3600)
MAX_EXAMPLES = 24
_BARS = 12
# What `make demo` leaves, in the folder where it ran: pyramid and CLIP, with pictures to try.
_DEMO = Path("runs/demo")
# The browser itself refuses whatever would leave this machine.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'"
)
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_SURPRISE = "Something went wrong while answering. It is written down where the page was started; nothing else is lost."


def run_app(args: argparse.Namespace) -> int:
    """Serves the page until Ctrl-C; prints its address."""
    with tempfile.TemporaryDirectory(prefix="pyramidclip-app-") as folder:
        # Gradio asks for it when it is imported, and whenever it keeps what was uploaded or answered.
        os.environ["GRADIO_TEMP_DIR"] = folder
        web = _web()
        check_address(args.host, args.port)
        _fill_in_the_demo(args)
        return _served(web, args)


def _served(web: SimpleNamespace, args: argparse.Namespace) -> int:
    labels = "\n".join(labels_of(read_utf8(args.labels_file))) if args.labels_file else ""
    paths = find_pictures(args.examples)[:MAX_EXAMPLES] if args.examples else []
    for path in paths:
        open_picture(path, args.max_image_pixels)
    examples = Examples.of(paths)
    names = [args.model, args.compare] if args.compare else [args.model]
    device = choose_device(args.device)
    models = []
    for name, title, flag in zip(names, titles_of(names), ("--model", "--compare")):
        revision = args.revision if flag == "--model" else None
        models.append(TriedModel(load_model(name, revision=revision, device=device, flag=flag), title))
    distribute_embeddings(models, args.embeddings)
    page = Page(web, models, examples, labels, args.max_image_pixels).blocks
    address = _serve(web, page, args)
    print(address, flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)
    return 0


def check_address(host: str, port: int | None) -> None:
    """Looks whether the page can be served there, before models are read.

    Gradio would try a hundred ports of a host that is none of this machine's, for five seconds each.

    Raises:
        ValueError: the port is taken, or the host is none of this machine's.
    """
    try:
        places = socket.getaddrinfo(host.strip("[]"), port or 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, place = places[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(place)
    except OSError as error:
        raise _no_place(host, port, error) from error


def _no_place(host: str, port: int | None, error: OSError) -> ValueError:
    where = f"--host {host}" + (f" --port {port}" if port else "")
    return ValueError(f"{where}: the page cannot be served there ({error}). Choose another --host or --port.")


def _web() -> SimpleNamespace:
    """Gradio and Starlette.

    Raises:
        ImportError: they are not installed; names the extra.
    """
    # Read when they are imported: nothing is sent to anybody.
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    try:
        import gradio
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
    except ImportError as error:
        raise ImportError('the page needs Gradio: pip install "pyramidclip-hf[app]"') from error
    return SimpleNamespace(gradio=gradio, middleware=Middleware, hosts=TrustedHostMiddleware)


def _fill_in_the_demo(args: argparse.Namespace) -> None:
    """Without --model: the demo's two models, and what of its pictures is there.

    Raises:
        ValueError: there is no demo here.
    """
    if args.model:
        return
    folders = {name: _DEMO / name / "final" for name in ("pyramid", "clip")}
    if not all((folder / "config.json").is_file() for folder in folders.values()):
        raise ValueError(
            f"--model: expected the folder of a saved model or a Hub id. Without it the page shows what `make demo` "
            f"leaves in {_DEMO}, which is not there."
        )
    args.model, args.compare = str(folders["pyramid"]), args.compare or str(folders["clip"])
    examples, labels = _DEMO / "examples", _DEMO / "examples" / "labels.txt"
    args.examples = args.examples or ([str(examples)] if examples.is_dir() else [])
    args.labels_file = args.labels_file or (str(labels) if labels.is_file() else None)
    if not args.embeddings:
        args.embeddings = [str(path) for name in folders if (path := _DEMO / f"{name}.npz").is_file()]


def _serve(web: SimpleNamespace, page: Any, args: argparse.Namespace) -> str:
    """Starts the server and returns the page's address.

    Raises:
        ValueError: the port has been taken since, or --share was given and there is no public address.
    """
    local = args.host in _LOOPBACK and not args.share
    middleware = [web.middleware(_Headers, framed=not local)]
    if local:  # a name of somebody's that leads here is refused
        middleware.append(web.middleware(web.hosts, allowed_hosts=[*_LOOPBACK, "[::1]"]))
    try:
        _, address, shared = page.launch(
            server_name=args.host,
            server_port=args.port,
            share=args.share,
            quiet=True,
            prevent_thread_lock=True,
            show_error=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
            allowed_paths=[],
            max_file_size=MAX_UPLOAD_BYTES,
            app_kwargs={"middleware": middleware, "docs_url": None, "redoc_url": None, "openapi_url": None},
            theme=_theme(web.gradio),
            js=Path(__file__).with_name("app_page.js").read_text(encoding="utf8"),
            css=Path(__file__).with_name("app_page.css").read_text(encoding="utf8"),
        )
    except OSError as error:
        raise _no_place(args.host, args.port, error) from error
    if args.share and not shared:
        page.close(verbose=False)
        raise ValueError("--share: Gradio's servers gave no public address. Is the network there? Or leave it out.")
    return str(shared or address)


class _Headers:
    """Puts the policy on every answer; pure ASGI, so that events are passed on as they come."""

    def __init__(self, app: Any, framed: bool):
        policy = _POLICY if framed else f"{_POLICY}; frame-ancestors 'none'"
        self.app = app
        self.headers = [
            (b"content-security-policy", policy.encode()),
            (b"referrer-policy", b"no-referrer"),
            (b"x-content-type-options", b"nosniff"),
        ]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *self.headers]
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)


def _theme(gradio: Any) -> Any:
    """Calm colours, and the fonts that the visitor's machine has."""
    theme = gradio.themes.Default(
        primary_hue="blue", neutral_hue="slate", radius_size="md", font=_FONTS, font_mono=("ui-monospace", "monospace")
    )
    return theme.set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_600",
        block_title_text_color="*neutral_700",
    )


class Page:
    """The four parts around one picture.

    Attributes:
        blocks: what Gradio serves.
    """

    def __init__(
        self,
        web: SimpleNamespace,
        models: Sequence[TriedModel],
        examples: Examples,
        labels: str,
        max_image_pixels: int,
    ):
        self.gradio, self.models, self.examples = web.gradio, models, examples
        self.labels_at_first, self.max_image_pixels = labels, max_image_pixels
        gradio = self.gradio
        # What is shown of the picture, and how it looks when there is another one.
        self.of_the_picture: list[tuple[Any, Any]] = []
        self.blocks = gradio.Blocks(title="PyramidCLIP", analytics_enabled=False, delete_cache=_CLEANING)
        with self.blocks:
            gradio.HTML(self._head(), padding=False)
            with gradio.Row(equal_height=False):
                with gradio.Column(scale=2, min_width=300):
                    self.picture = self._picture()
                with gradio.Column(scale=3, min_width=300), gradio.Tabs():
                    with gradio.Tab("Classify"):
                        self.labels, self.templates = self._classify()
                    with gradio.Tab("Why"):
                        self._why()
                    with gradio.Tab("Search"):
                        self._search()
                    with gradio.Tab("Compare"):
                        self._compare()
            outputs, blanks = zip(*self.of_the_picture)
            self.picture.change(
                lambda path: (self._look_at(path), *blanks),
                [self.picture],
                [self.picture_message, *outputs],
                show_progress="hidden",
            )
        self.blocks.queue(max_size=_MAX_WAITING, api_open=False)

    def _head(self) -> str:
        names = " and ".join(f"<b>{html.escape(model.title)}</b>" for model in self.models)
        return (
            f'<header class="head"><h1>PyramidCLIP</h1><p>Pictures and words, by {names}. '
            "Nothing that you give is kept for longer than an hour.</p></header>"
        )

    def _picture(self) -> Any:
        """The picture that all parts speak of, and the examples."""
        picture = self.gradio.Image(
            label="Picture",
            type="filepath",
            sources=["upload", "clipboard", "webcam"],
            height=320,
            buttons=[],
            alt_text="The picture that you chose",
            elem_id="picture",
        )
        # Gradio would decode it, whatever it is, before anybody has looked at its size.
        picture.preprocess = _path_of
        self.picture_message = self._message_place()
        if self.examples.paths:
            rows = [[path] for path in self.examples.paths]
            self.gradio.Examples(rows, picture, label="Examples", cache_examples=False, examples_per_page=MAX_EXAMPLES)
        return picture

    def _look_at(self, path: str | None) -> str:
        """What is wrong with a picture that has just been chosen."""
        try:
            if path:
                open_picture(path, self.max_image_pixels).close()
        except ValueError as error:
            return _alert(str(error))
        return ""

    def _message(self) -> Any:
        """The place of a part's message, which another picture empties."""
        place = self._message_place()
        self.of_the_picture.append((place, ""))
        return place

    def _message_place(self) -> Any:
        return self.gradio.HTML("", elem_classes="said", container=False, padding=False)

    def _answering(self, answer: Callable[..., tuple[Any, ...]], blanks: int) -> Callable[..., Any]:
        """`answer`'s results and an empty message; or that many blanks and the sentence that says what is wrong."""

        def handler(*inputs: Any, progress: Any = self.gradio.Progress()) -> Any:  # noqa: B008  # how Gradio finds it
            try:
                results, message = answer(*inputs, lambda share: progress(share)), ""
            except ValueError as error:
                results, message = (None,) * blanks, str(error)
            except Exception:  # nobody who asks shall read the inside of the program
                traceback.print_exc(file=sys.stderr)
                results, message = (None,) * blanks, _SURPRISE
            return (*results, _alert(message))

        return handler

    # Classify

    def _classify(self) -> tuple[Any, Any]:
        gradio = self.gradio
        labels = gradio.Textbox(
            self.labels_at_first,
            label="Labels, one a line",
            placeholder="a cat\na dog\na red bat",
            lines=5,
            max_lines=12,
            elem_id="labels",
        )
        templates = gradio.Checkbox(
            True,
            label="In CLIP's 80 sentences",
            info="Each label as “a photo of a …”, “a drawing of the …” and so on: slower, usually better.",
        )
        button = gradio.Button("Classify", variant="primary", elem_id="classify")
        message = self._message()
        bars = gradio.Label(label="Probability", num_top_classes=_BARS, show_heading=False, elem_id="bars")
        self.of_the_picture.append((bars, None))
        button.click(
            self._answering(self._classified, 1),
            [self.picture, labels, templates],
            [bars, message],
            show_progress_on=bars,
        )
        return labels, templates

    def _classified(self, path: str | None, labels: str, templates: bool, progress: Any) -> tuple[dict[str, float]]:
        names = labels_of(labels)
        picture = open_picture(path, self.max_image_pixels)
        found = self.models[0].classify(picture, names, templates, progress)
        return ({one.name: one.probability for one in found},)

    # Why

    def _why(self) -> None:
        gradio = self.gradio
        text = gradio.Dropdown(
            choices=self._choices(self.labels_at_first),
            value=None,
            label="What to look for",
            info="A label, or any words of your own.",
            allow_custom_value=True,
            elem_id="text",
        )
        self.labels.blur(self._renewed_choices, [self.labels, text], [text], show_progress="hidden", queue=False)
        with gradio.Accordion("Regions of the picture", open=False):
            files = gradio.File(
                label="NAME.json and NAME.roi.npy, as shards hold them",
                file_count="multiple",
                file_types=[".json", ".npy"],
                type="filepath",
                height=120,
            )
        with gradio.Row():
            heat = gradio.Button("Show the heat map", variant="primary", elem_id="heat")
            regions = gradio.Button("Which region spoke", elem_id="regions")
        message = self._message()
        overlay = gradio.Image(
            label="What speaks for it",
            type="pil",
            format="jpeg",
            interactive=False,
            buttons=["download", "fullscreen"],
            alt_text="The picture with what speaks for the text laid over it",
            elem_id="overlay",
        )
        told = gradio.HTML("", elem_id="told", container=False, padding=False)
        self.of_the_picture += [(overlay, None), (told, "")]
        outputs = [overlay, told, message]
        heat.click(self._answering(self._heat, 2), [self.picture, text], outputs, show_progress_on=overlay)
        regions.click(
            self._answering(self._region_frames, 2), [self.picture, text, files], outputs, show_progress_on=overlay
        )

    @staticmethod
    def _choices(labels: str) -> list[str]:
        """The labels as far as they are good ones; what is wrong with them is said when they are used."""
        lines = (" ".join(line.split()) for line in labels.splitlines()[:MAX_LABELS])
        return list(dict.fromkeys(line for line in lines if line))

    def _renewed_choices(self, labels: str, chosen: str | None) -> Any:
        return self.gradio.Dropdown(choices=self._choices(labels or ""), value=chosen)

    def _heat(self, path: str | None, text: str | None, progress: Any) -> tuple[Image.Image, str]:
        picture = open_picture(path, self.max_image_pixels)
        text = checked_text(text, "“What to look for”")
        why = self.models[0].explain(picture, text)
        return why.overlay, _told_of(why, text)

    def _region_frames(
        self, path: str | None, text: str | None, files: list[str] | None, progress: Any
    ) -> tuple[Image.Image, str]:
        picture = open_picture(path, self.max_image_pixels)
        text = checked_text(text, "“What to look for”")
        why = self.models[0].explain_regions(picture, self._regions(path, files), text)
        return why.overlay, _told_of(why, text)

    def _regions(self, path: str | None, files: list[str] | None) -> Regions:
        """Those that were given, else those of the example that the picture is."""
        if files:
            kinds = {Path(file).suffix.lower(): file for file in files}
            if len(files) != 2 or kinds.keys() != {".json", ".npy"}:
                raise ValueError("Regions are two files: NAME.json with the boxes, NAME.roi.npy with the features.")
            return read_regions(kinds[".json"], kinds[".npy"])
        regions = self.examples.regions_of(path)
        if regions is None:
            raise ValueError(
                "This picture comes without regions. Open “Regions of the picture” and give the two files that a "
                "detector left (docs/prepare.md), or take an example that has some."
            )
        return regions

    # Search

    def _search(self) -> None:
        gradio = self.gradio
        model = self.models[0]
        gradio.HTML(_about_embeddings(model), padding=False, elem_classes="quiet")
        query = gradio.Textbox(label="Words to search for", placeholder="a red bat", max_lines=1, elem_id="query")
        count = gradio.Slider(1, MAX_HITS, 12, step=1, label="How many")
        with gradio.Row():
            by_text = gradio.Button("Search by words", variant="primary", elem_id="by-words")
            by_picture = gradio.Button("Search by the picture", elem_id="by-picture")
        message = self._message()
        gallery, listed = self._results(model, "hits")
        outputs = [gallery, listed, message]
        asked = self._answering(lambda *inputs: self._found(0, "words", *inputs), 2)
        shown = self._answering(lambda *inputs: self._found(0, "picture", *inputs), 2)
        for event in (by_text.click, query.submit):
            event(asked, [query, count], outputs, show_progress_on=gallery)
        by_picture.click(shown, [self.picture, count], outputs, show_progress_on=gallery)

    def _results(self, model: TriedModel, name: str, columns: int = 3) -> tuple[Any, Any]:
        """Where hits are shown: pictures as a wall, texts as a list."""
        gallery = self.gradio.Gallery(
            label=f"Found by {model.title}",
            columns=columns,
            height="auto",
            object_fit="contain",
            interactive=False,
            buttons=[],
            format="jpeg",
            visible=model.kind == "path",
            elem_id=name,
        )
        return gallery, self.gradio.HTML("", container=False, padding=False, elem_classes="listed")

    def _found(self, number: int, how: str, given: str | None, count: float, progress: Any) -> tuple[Any, str]:
        """The hits of a model for words or for a picture."""
        model = self.models[number]
        query = checked_text(given, "The search") if how == "words" else open_picture(given, self.max_image_pixels)
        hits = model.search(query, int(count))
        if model.kind != "path":
            rows = "".join(f"<li>{html.escape(hit.name)} <span>{hit.score:.3f}</span></li>" for hit in hits)
            return [], f"<ol>{rows}</ol>"
        entries, absent = wall(hits, self.max_image_pixels, progress)
        lost = f"<p>{absent} of them are not where they lay when the file was written.</p>" if absent else ""
        return entries, lost

    # Compare

    def _compare(self) -> None:
        gradio = self.gradio
        if len(self.models) < 2:
            gradio.HTML(
                "<p>One model is here. Start the page with <code>--compare FOLDER_OR_ID</code> to see a second one "
                "beside it, on the same picture and the same words.</p>",
                padding=False,
                elem_classes="quiet",
            )
            return
        gradio.HTML(
            "<p>Both see the picture and the labels of “Classify”, or search for the same words.</p>",
            padding=False,
            elem_classes="quiet",
        )
        picture = gradio.Button("Compare on the picture", variant="primary", elem_id="compare")
        query = gradio.Textbox(label="Words to search for", placeholder="a red bat", max_lines=1, elem_id="both-query")
        search = gradio.Button("Compare the search", elem_id="compare-search")
        message = self._message()
        bars, walls = [], []
        with gradio.Row():
            for number, model in enumerate(self.models):
                with gradio.Column(min_width=220):
                    bars.append(
                        gradio.Label(
                            label=model.title, num_top_classes=_BARS, show_heading=False, elem_id=f"bars-{number}"
                        )
                    )
                    walls.append(self._results(model, f"hits-{number}", columns=2))
        self.of_the_picture += [(one, None) for one in bars]
        picture.click(
            self._answering(self._compared, 2),
            [self.picture, self.labels, self.templates],
            [*bars, message],
            show_progress_on=bars,
        )
        outputs = [part for found in walls for part in found]
        for event in (search.click, query.submit):
            event(
                self._answering(self._both_found, 4),
                [query],
                [*outputs, message],
                show_progress_on=[gallery for gallery, _ in walls],
            )

    def _compared(self, path: str | None, labels: str, templates: bool, progress: Any) -> tuple[Any, ...]:
        names = labels_of(labels)
        picture = open_picture(path, self.max_image_pixels)
        bars = []
        for done, model in enumerate(self.models):

            def share_of_both(share: float, done: int = done) -> None:
                progress((done + share) / 2)

            found = model.classify(picture, names, templates, share_of_both)
            bars.append({one.name: one.probability for one in found})
        return tuple(bars)

    def _both_found(self, query: str | None, progress: Any) -> tuple[Any, ...]:
        return tuple(part for number in (0, 1) for part in self._found(number, "words", query, 6, progress))


def _alert(message: str) -> str:
    return f'<p role="alert">{html.escape(message)}</p>' if message else ""


def _path_of(given: Any) -> str | None:
    """The file that holds what was given as a picture."""
    return None if given is None else given.path


def _told_of(why: Why, text: str) -> str:
    """The score, and the regions with what each adds."""
    said = f"<p>The picture's score for “{html.escape(text)}”: <b>{why.score:.3f}</b></p>"
    if not why.parts:
        return said
    rows = "".join(f"<li>{html.escape(name)} <span>{share:+.3f}</span></li>" for name, share in why.parts)
    return f"{said}<p>By how much it falls without each region:</p><ol>{rows}</ol>"


def _about_embeddings(model: TriedModel) -> str:
    if model.embeddings is None:
        return (
            "<p>There is nothing to search in yet: write a file with <code>pyramidclip embed</code> and start the page "
            "with <code>--embeddings FILE</code>.</p>"
        )
    what = "pictures" if model.kind == "path" else "texts"
    return f"<p>{model.rows:,} {what}, embedded by {html.escape(model.title)}.</p>"
