"""The page: what is on it, and what happens when it is used."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

import gradio as gr
import torch
from gradio.components import Component

from page.html import comparison, data_url, heading, picture, placeholder
from page.job import run
from page.library import Library
from page.safety import middleware
from page.settings import EVERYWHERE, Limits, Pictures, Side, solver_names, start_solver
from runtime.redact import redact

TURNS = "all in turn"
NULL_LABEL = "the null label"
QUICK = {"gaussian": "dpm++2m", "transport": "ODE ab2"}  # what side B starts with
QUICK_STEPS = 20
MAX_WAITING = 16
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
QUIET = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}  # an event that waits for no job
DARK = "() => { document.body.classList.toggle('dark'); }"


@dataclass(frozen=True)
class Controls:
    """One side's components."""

    model: Component
    solver: Component
    steps: Component
    amm: Component
    scale: Component
    channels: Component
    low: Component
    high: Component
    power: Component
    guide: Component
    ratios: Component
    first: Component

    @property
    def inputs(self) -> list[Component]:
        return list(vars(self).values())

    def read(self, values: dict[Component, object], titles: list[str]) -> Side:
        """What is chosen. Raises ValueError for what is no number."""
        model, guide, scale = (values[component] for component in (self.model, self.guide, self.scale))
        return Side(
            model=None if model == TURNS else titles.index(model),
            solver=values[self.solver],
            steps=_whole("Steps", values[self.steps]),
            cfg_scale=_number("Guidance scale", scale),
            channels=values[self.channels],
            interval=(_number("Guided from level", values[self.low]), _number("to level", values[self.high])),
            power=_number("Power", values[self.power]),
            guide=None if guide == NULL_LABEL else titles.index(guide),
            amm=(values[self.amm] or "off").strip(),
            ratios=_ratios(values[self.ratios]) if model == TURNS else (),
            first_several_num=_whole("First changes", values[self.first]),
        )


def _number(what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{what} is empty: write a number")
    return float(value)


def _whole(what: str, value: object) -> int:
    if _number(what, value) % 1:
        raise ValueError(f"{what} {value}: write a whole number")
    return int(value)


def _ratios(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"switch ratios {text!r}: write numbers with commas between, as 0.3, 0.1") from None


def _start_solver(library: Library, index: int, quick: bool) -> str:
    """What a side starts with: as the flags say, or few steps."""
    checkpoint = library.checkpoints[index]
    if quick:
        return QUICK[checkpoint.objective["name"]]
    try:
        return start_solver(library.args, checkpoint)
    except ValueError:  # the flags are for the first checkpoint, perhaps of other mathematics
        return solver_names(checkpoint)[0]


def _side(library: Library, name: str, limits: Limits) -> Controls:
    """The components of side A or B."""
    args, titles = library.args, [library.title(i) for i in range(len(library.checkpoints))]
    quick, several = name == "B", len(titles) > 1
    index = len(titles) - 1 if quick else 0
    models = titles + ([TURNS] if library.can_take_turns() else [])
    with gr.Column(min_width=420):
        gr.HTML(f'<div class="name {name.lower()}"><span>{name}</span></div>')
        with gr.Group():
            model = gr.Dropdown(models, value=titles[index], label="Model", visible=several, elem_id=f"model-{name}")
            with gr.Row():
                names = solver_names(library.checkpoints[index])
                solver = gr.Dropdown(
                    names, value=_start_solver(library, index, quick), label="Solver", elem_id=f"solver-{name}"
                )
                start = min(QUICK_STEPS if quick else args.num_sampling_steps, limits.steps)
                steps = gr.Slider(1, limits.steps, value=start, step=1, label="Steps", elem_id=f"steps-{name}")
            with gr.Row():
                scale = gr.Slider(0, 15, value=args.cfg_scale, step=0.1, label="Guidance scale", elem_id=f"scale-{name}")
                amm = gr.Dropdown(
                    ["off", "on"], value="off", allow_custom_value=True, elem_id=f"amm-{name}",
                    **_amm_texts(library, index, args.cfg_scale),
                )  # fmt: skip
        with gr.Group(visible=args.cfg_scale != 1) as guidance:
            channels, low, high, power, guide = _guidance(library, name, titles, index)
        with gr.Group(visible=False) as turns, gr.Row():
            ratios = gr.Textbox("0.3, 0.1", label="Switch ratios, falling: one fewer than models", elem_id=f"ratios-{name}")
            first = gr.Number(3, precision=0, minimum=1, label="First changes, the reference", elem_id=f"first-{name}")

    def number_of(chosen: str) -> int | None:
        return None if chosen == TURNS else titles.index(chosen)

    def choose(chosen: str, cfg_scale: float | None):
        number = number_of(chosen) or 0
        return (
            gr.update(choices=solver_names(library.checkpoints[number]), value=_start_solver(library, number, quick)),
            gr.update(value="off", **_amm_texts(library, number_of(chosen), cfg_scale)),
            gr.update(visible=chosen == TURNS),
            gr.update(value=_published_power(library, number)),
        )

    def rescale(chosen: str, cfg_scale: float | None):
        return gr.update(visible=cfg_scale != 1), gr.update(**_amm_texts(library, number_of(chosen), cfg_scale))

    model.input(choose, [model, scale], [solver, amm, turns, power], **QUIET)
    scale.change(rescale, [model, scale], [guidance, amm], **QUIET)
    return Controls(model, solver, steps, amm, scale, channels, low, high, power, guide, ratios, first)


def _guidance(library: Library, name: str, titles: list[str], index: int) -> tuple[Component, ...]:
    args = library.args
    low, high = args.guidance_interval or EVERYWHERE
    with gr.Row():
        level = {"minimum": 0, "maximum": 1, "step": 0.01}
        from_ = gr.Slider(value=low, label="Guided from level (0: data)", elem_id=f"low-{name}", **level)
        to = gr.Slider(value=high, label="to level (1: noise)", elem_id=f"high-{name}", **level)
    with gr.Row():
        channels = gr.Radio(
            [("first 3", "3"), ("all", "all")],
            value=args.cfg_channels or "3",
            label="Guided channels",
            elem_id=f"channels-{name}",
        )
        start = _published_power(library, index) if args.cfg_power is None else args.cfg_power
        power = gr.Slider(0, 10, value=start, step=0.5, label="Growth (0: constant)", elem_id=f"power-{name}")
    guide = gr.Dropdown(
        [NULL_LABEL, *titles], value=NULL_LABEL, label="Guide away from", visible=len(titles) > 1, elem_id=f"guide-{name}"
    )
    return channels, from_, to, power, guide


def _amm_texts(library: Library, index: int | None, cfg_scale: float | None) -> dict:
    """Of the choice of AMM. index: of the model, None for all in turn. cfg_scale: None while the field is empty."""
    placement = None if index is None else library.placement(index, 1.0 if cfg_scale is None else cfg_scale)
    return {"label": f"AMM (on = {placement})" if placement else "AMM", "visible": placement is not None}


def _published_power(library: Library, index: int) -> float:
    gaussian = library.checkpoints[index].objective["name"] == "gaussian"
    return getattr(library.network(index), "cfg_power", 0.0) if gaussian else 0.0


def _heading(library: Library) -> str:
    first = library.checkpoints[0]
    size = first.config.input_size * library.codecs[0].downsample
    titles = [library.title(i).partition(": ")[2] for i in range(len(library.checkpoints))]
    device = torch.cuda.get_device_name(library.device) if library.device.type == "cuda" else str(library.device)
    objective = {"gaussian": "Gaussian diffusion", "transport": "transport"}[first.objective["name"]]
    facts = f"{size} x {size} pixels, {library.num_classes} classes, {objective}, {library.args.precision} on {device}"
    return heading(" / ".join(titles) if len(titles) < 3 else f"{len(titles)} checkpoints", [facts])


def _pictures(labels: list[int] | None, per_class: object, seed: object) -> Pictures:
    return Pictures(labels=tuple(labels or ()), per_class=_whole("Pictures a class", per_class), seed=_whole("Seed", seed))


def build(library: Library) -> gr.Blocks:
    """The page of a library. One job runs at a time, the others wait."""
    args = library.args
    limits = Limits(images=args.max_images, steps=args.max_steps, seconds=args.max_seconds)
    names = library.class_names
    with gr.Blocks(title="Denoising, side by side", analytics_enabled=False) as page:
        with gr.Row(elem_id="head"):
            gr.HTML(_heading(library))
            dark = gr.Button("Dark / light", size="sm", scale=0, min_width=110)
        with gr.Row(equal_height=True):
            choices = [(name if name == str(label) else f"{name} ({label})", label) for label, name in enumerate(names)]
            start = list(range(min(len(names), limits.images, 4)))
            labels = gr.Dropdown(choices, value=start, multiselect=True, label="Classes", scale=4, elem_id="classes")
            most = max(1, min(limits.images, 16))
            per_class = gr.Slider(
                1, most, value=min(4, limits.images // len(start)), step=1, label="Pictures a class",
                scale=2, elem_id="per-class",
            )  # fmt: skip
            seed = gr.Number(args.seed, precision=0, label="Seed", scale=1, elem_id="seed")
            with gr.Column(scale=1, min_width=140):
                start_button = gr.Button("Sample", variant="primary", elem_id="run")
                stop_button = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop")
        status = gr.HTML(
            '<p class="hint">Both sides start from the same noise. A guidance scale of 1 is none.</p>', elem_id="status"
        )
        with gr.Row():
            sides = [_side(library, name, limits) for name in "AB"]
        with gr.Row():
            figures = [gr.HTML(placeholder(name), elem_id=f"side-{name}", min_width=420) for name in "AB"]
        compared = gr.HTML(elem_id="compared")
        dark.click(None, js=DARK, api_visibility="private")
        _wire(library, limits, (labels, per_class, seed), sides, (start_button, stop_button, *figures, status, compared), page)
    return page


def _wire(library: Library, limits: Limits, common: tuple, sides: list[Controls], shown: tuple, page: gr.Blocks) -> None:
    """What the buttons do."""
    start_button, stop_button, *outputs = shown
    status, compared = outputs[2:]
    titles, names = [library.title(i) for i in range(len(library.checkpoints))], library.class_names
    wanted: set[str] = set()  # sessions whose job may go on

    def begin(request: gr.Request):
        if len(wanted) > MAX_WAITING:  # one of them is at work
            raise gr.Error(f"{MAX_WAITING} jobs are waiting: try again in a while", print_exception=False)
        wanted.add(request.session_hash)
        return gr.update(interactive=False), gr.update(interactive=True), _hint("Waiting for its turn ..."), ""

    def work(values: dict, request: gr.Request) -> Iterator[list]:
        session, unchanged = request.session_hash, [gr.skip(), gr.skip()]
        try:
            chosen = [side.read(values, titles) for side in sides]
            pictures = _pictures(*(values[component] for component in common))
            rows = [names[label] for label in pictures.labels if 0 <= label < len(names)]
            drawn, urls = [None, None], ["", ""]
            for frames in run(library, chosen, pictures, limits, library.args.frames, lambda: session not in wanted):
                sent = [placeholder("A"), placeholder("B")] if drawn[0] is None else [*unchanged]
                for i, frame in enumerate(frames):
                    if frame is not drawn[i]:
                        urls[i] = data_url(frame.images, pictures.per_class, rows)
                        sent[i] = picture(frame, urls[i], "AB"[i], pictures)
                drawn = frames
                yield [*sent, _hint("Sampling ..."), ""]
            done = all(frame and frame.done for frame in drawn)
            yield [*unchanged, _hint("Done." if done else "Stopped."), comparison(drawn, urls)]
        except torch.OutOfMemoryError:
            yield [*unchanged, _error("the device ran out of memory: choose fewer pictures"), ""]
        except (ValueError, TimeoutError) as error:
            yield [*unchanged, _error(redact(str(error))), ""]
        finally:
            wanted.discard(session)

    def end():
        return gr.update(interactive=True), gr.update(interactive=False)

    def stop(request: gr.Request) -> None:
        wanted.discard(request.session_hash)

    inputs = {*common, *(component for side in sides for component in side.inputs)}
    begun = start_button.click(begin, None, [start_button, stop_button, status, compared], **QUIET)
    worked = begun.success(work, inputs, outputs, concurrency_limit=1, show_progress="hidden", api_visibility="private")
    worked.then(end, None, [start_button, stop_button], **QUIET)
    stop_button.click(stop, None, None, **QUIET)
    page.unload(stop)


def _hint(text: str) -> str:
    return f'<p class="hint">{text}</p>'


def _error(text: str) -> str:
    return f'<p class="error" role="alert">{escape(text)}</p>'


def launch(page: gr.Blocks, args: Namespace, block: bool = True) -> str:
    """Serve it; the address. It opens no tunnel, and reads and writes no files for a browser. Raises ValueError for an address
    that cannot be had."""
    try:
        address = _serve(page, args)
    except OSError as error:
        raise ValueError(
            f"--host {args.host} --port {args.port} cannot be listened on: choose another port, or host"
        ) from error
    print(f"{address} (Ctrl+C ends it)", flush=True)
    if block:
        page.block_thread()
    return address


def _serve(page: gr.Blocks, args: Namespace) -> str:
    page.queue(max_size=None)  # it would count every event, and refuse even Stop: begin() counts the jobs
    _, address, _ = page.launch(
        server_name=f"[{args.host}]" if ":" in args.host else args.host,
        server_port=args.port,
        theme=gr.themes.Default(primary_hue="teal", neutral_hue="slate", **FONTS),
        css_paths=[Path(__file__).with_name("style.css")],
        share=False,
        quiet=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        ssr_mode=False,
        allowed_paths=[],
        max_file_size=1,
        app_kwargs={"middleware": middleware(args.host)},
        prevent_thread_lock=True,
    )
    return address
