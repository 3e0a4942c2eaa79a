"""The command line. It starts fast: nothing heavy is imported before a verb needs it."""

# no annotations from __future__ here: typer would compile each of them anew at every start
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

if TYPE_CHECKING:
    from tailseg.running import Finished


class _Verbs(TyperGroup):
    """Typer's own help loads a parser of Markdown and a highlighter of code: a third of the time that `--help` took."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from rich.padding import Padding
        from rich.panel import Panel
        from rich.table import Table

        usage = f"[yellow]Usage:[/] [bold]{ctx.command_path}[/] COMMAND \\[ARGS]..."
        console.print(Padding(f"{usage}\n\n{self.help}", 1), highlight=False)
        verbs = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        told = {name: verb.help or "" for name, verb in verbs.items() if verb and not verb.hidden}
        for title, rows in (("Options", {"--help": "Show this message and exit."}), ("Commands", told)):
            table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
            for name, text in rows.items():
                table.add_row(f"[bold cyan]{name}", " ".join(text.split("\n\n")[0].split()))
            console.print(Panel(table, title=title, title_align="left", border_style="dim"), highlight=False)


cli = typer.Typer(
    name="tailseg",
    cls=_Verbs,
    help="Semi-supervised, class-imbalanced segmentation of medical images, from a folder to scored predictions.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = Console()
errors = Console(stderr=True)

RecipeArgument = Annotated[Path, typer.Argument(help="YAML file, e.g. recipes/synapse_mini/dhc_20p.yaml")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="overrides, e.g. train.lr=0.01 method.weighter_a=dist"),
]
Workers = Annotated[int, typer.Option(help="processes that read and prepare scans")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
KINDS = ("methods", "networks", "weighters", "preparations", "protocols")


@cli.command(name="check")
def check_(
    folder: Annotated[Path, typer.Argument(help="data set: images, labels, dataset.json")],
    json_: Annotated[bool, typer.Option("--json", help="write facts and problems as JSON, and nothing else")] = False,
    workers: Workers = 2,
    debug: Debug = False,
) -> None:
    """Read every scan of a data set once and say all that is wrong with it, and what it holds.

    Exits with 1 if it holds errors, which keep it from being trained on; warnings ask for a look.
    """
    from tailseg import app
    from tailseg.data.check_text import check_text

    if json_:
        import json

        report = app.check(folder, workers=workers)
        typer.echo(json.dumps(report.to_dict(), indent=1, allow_nan=False))
    else:
        with _progress("checking") as progress:
            report = app.check(folder, progress, workers)
        console.print(check_text(report), highlight=False)
    if not report.ok:
        raise typer.Exit(1)


@cli.command()
def plan(
    folder: Annotated[Path, typer.Argument(help="a data set, as `tailseg check` takes it")],
    out: Annotated[Path | None, typer.Option(help="recipe to write; default <folder name>.yaml")] = None,
    hours: Annotated[float, typer.Option(min=0.0, help="for the whole run, on this machine")] = 8.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")] = "auto",
    split: Annotated[str | None, typer.Option(help="a split of the folder's splits.json; default: made here")] = None,
    test: Annotated[list[str] | None, typer.Option(help="labelled case to keep out of training, repeatable")] = None,
    method: Annotated[str | None, typer.Option(help="instead of the one that the data suggest")] = None,
    store: Annotated[Path, typer.Option(help="folder for the prepared scans")] = Path("stores"),
    force: Annotated[bool, typer.Option("--force", help="replace a recipe that is there")] = False,
    workers: Workers = 2,
    debug: Debug = False,
) -> None:
    """Look at a folder and this machine, and write a recipe to read and edit: every choice with its reason."""
    from rich.markup import escape

    from tailseg import planning
    from tailseg.data.plan_file import estimate_lines, fingerprint_lines

    with _progress("reading") as report:
        made = planning.plan(
            folder,
            out,
            split=split,
            test=test or (),
            hours=hours,
            device=device,
            method=method,
            store=store,
            force=force,
            workers=workers,
            report=report,
        )
    for line in (*fingerprint_lines(made.fingerprint), *estimate_lines(made.plan, made.machine)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for note in made.plan.notes:
        console.print(f"[yellow]note:[/yellow] {escape(note)}", highlight=False, soft_wrap=True)
    also = f" and {made.split_file}" if made.split_file else ""
    console.print(
        f"wrote {made.recipe}{also}; read it, then: tailseg train {made.recipe}", highlight=False, soft_wrap=True
    )


@cli.command()
def run(
    folder: Annotated[Path, typer.Argument(help="a data set, as `tailseg check` takes it")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="folder for everything; default runs/<folder name>")] = None,
    hours: Annotated[float, typer.Option(min=0.0, help="for everything, on this machine")] = 8.0,
    recipe: Annotated[Path | None, typer.Option(help="train this recipe in place of a planned one")] = None,
    method: Annotated[str | None, typer.Option(help="instead of the one that the data suggest")] = None,
    test: Annotated[list[str] | None, typer.Option(help="labelled case to keep out and score on, repeatable")] = None,
    split: Annotated[str | None, typer.Option(help="a split of the folder's splits.json; default: made here")] = None,
    folds: Annotated[str, typer.Option(help="planned folds to train, a number or all; each labelled case of theirs is "
                                            "scored once, and their networks are averaged")] = "1",
    reference: Annotated[bool, typer.Option("--reference/--no-reference", help="also train without the unlabelled scans, "
                                            "to tell whether they helped")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")] = "auto",
    store: Annotated[Path, typer.Option(help="folder for the prepared scans")] = Path("stores"),
    workers: Workers = 2,
    debug: Debug = False,
) -> None:  # fmt: skip
    """From a folder to predictions of every unlabelled scan, a verdict on whether they helped, and a report.

    Checks, plans, prepares, trains with and without the unlabelled scans, predicts, evaluates and reports. Stop it with Ctrl-C
    whenever you like: the same command goes on where it was.
    """
    from tailseg.running import RunSettings
    from tailseg.running import run as run_all

    if folds != "all" and not (folds.isdigit() and int(folds)):
        raise typer.BadParameter(f"--folds {folds} is no number of folds; give 1, 2, ... or all")
    settings = RunSettings(
        data=str(folder),
        recipe=str(recipe) if recipe else None,
        overrides=tuple(overrides or ()),
        hours=hours,
        device=device,
        method=method,
        split=split,
        test=tuple(test or ()),
        folds="all" if folds == "all" else int(folds),
        reference=reference,
        store=str(store),
    )
    folder_out = out or Path("runs") / folder.resolve().name

    _tell(run_all(settings, folder_out, workers=workers, say=_say_when, progress=_progress))


@cli.command()
def prepare(recipe: RecipeArgument, overrides: Overrides = None, workers: Workers = 2, debug: Debug = False) -> None:
    """Read, check, resample and normalise the scans of a recipe once; training does it too where it is missing."""
    from tailseg import app
    from tailseg.recipe import load_recipe

    with _progress("preparing") as report:
        store, _, split = app.prepare(load_recipe(recipe, overrides or []), report, workers)
    console.print(f"{len(split.training)} cases prepared in {store.path}")
    for note in store.notes():
        console.print(f"[yellow]note:[/yellow] {note}", highlight=False)
    console.print(
        f"split '{split.name}': {len(split.labelled)} labelled, {len(split.unlabelled)} unlabelled, "
        f"{len(split.val)} validation; {len(split.test)} test scans stay unread"
    )


@cli.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="folder of the run; default runs/<data set>/<recipe>_seed<seed>")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the run's last checkpoint")] = False,
    workers: Workers = 2,
    debug: Debug = False,
) -> None:
    """Train a recipe. Stop it with Ctrl-C whenever you like; --resume goes on bit for bit."""
    from tailseg import app
    from tailseg.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    folder = out or Path("runs") / recipe.parent.name / f"{recipe.stem}_seed{loaded.seed}"
    with _progress("preparing") as report:
        run = app.train(loaded, folder, resume=resume, report=report, workers=workers)
    if os.environ.get("RANK", "0") == "0":  # one of several processes speaks for all
        console.print(f"run: {run}\npredict with: tailseg predict {run} test {run / 'predictions'}")


@cli.command()
def predict(
    run: Annotated[Path, typer.Argument(help="folder of a trained run, or of `tailseg run`, whose folds are averaged")],
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="a scan or picture, a folder of them (such as imagesTs), a folder of DICOM slices or of such folders; or the "
            "runs' own set: test, val, unlabelled",
        ),
    ],
    output: Annotated[Path, typer.Argument(help="folder for the label files, labels.json and volumes.csv")],
    with_: Annotated[
        list[Path] | None, typer.Option("--with", metavar="RUN", help="average with this run too, repeatable")
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="best (on validation) or last")] = "best",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")] = "auto",
    mirror: Annotated[
        str | None,
        typer.Option(
            metavar="AXES",
            help="average over mirrored views too: all, or some of lr,ap,si (left-right, ...), of pictures h,w; twice the time "
            "for each axis, and of use along those that training mirrored",
        ),
    ] = None,
    uncertainty: Annotated[
        bool,
        typer.Option(
            "--uncertainty",
            help="also write maps of entropy and, where several networks, runs or views are asked, of their disagreement",
        ),
    ] = False,
    clean_up: Annotated[
        bool,
        typer.Option(
            "--clean-up",
            help="keep the largest piece of a class, or fill its holes, where that helped on the runs' validation cases",
        ),
    ] = False,
    probabilities: Annotated[bool, typer.Option(help="also write the class probabilities, <case>_probs.npz")] = False,
    format_: Annotated[
        str, typer.Option("--format", help="nifti (of pictures PNG), or dicom-seg for DICOM series")
    ] = "nifti",
    force: Annotated[
        bool, typer.Option("--force", help="replace predictions that other runs or options made in OUTPUT")
    ] = False,
    debug: Debug = False,
) -> None:
    """Segment scans on their own grid and orientation.

    Called again it goes on where it was: finished cases are kept. Predictions of other runs or options are never mixed in.
    """
    import json

    from rich.markup import escape

    from tailseg import app

    if checkpoint not in ("best", "last"):
        raise typer.BadParameter(f"'{checkpoint}' is no checkpoint; use best or last")
    if format_ != "nifti" and format_ != "dicom-seg":
        raise typer.BadParameter(f"'{format_}' is no format; use nifti or dicom-seg")
    with _progress("predicting") as report:
        written = app.predict(
            [run, *(with_ or ())],
            source,
            output,
            checkpoint=checkpoint,
            device=device,
            save_probs=probabilities,
            mirror=[axis.strip() for axis in mirror.split(",")] if mirror else (),
            uncertainty=uncertainty,
            clean_up=clean_up,
            file_format=format_,
            resume=True,
            force=force,
            report=report,
        )
    told = json.loads((output / "labels.json").read_text(encoding="utf-8"))
    for note in told.get("notes", ()):
        console.print(f"[yellow]note:[/yellow] {escape(note)}", highlight=False, soft_wrap=True)
    if clean_up:
        cleaned = "; ".join(f"{name}: {' and '.join(each)}" for name, each in told.get("clean_up", {}).items())
        told_of = escape(cleaned or "none, nothing helped on the validation cases")
        console.print(f"clean-up: {told_of}", highlight=False, soft_wrap=True)
    console.print(
        f"{len(written)} label files in {output}, the names of their labels in {output / 'labels.json'}, "
        f"volumes in {output / 'volumes.csv'}",
        soft_wrap=True,
    )


@cli.command()
def export(
    run: Annotated[
        Path, typer.Argument(help="folder of a trained run, or of `tailseg run`: then the average of its folds")
    ],
    format_: Annotated[str, typer.Option("--format", help="onnx, torch, safetensors or monai-bundle")],
    out: Annotated[Path | None, typer.Option(help="folder to write; default RUN/export/<format>")] = None,
    fold: Annotated[str | None, typer.Option(help="export this fold alone, e.g. fold0")] = None,
    checkpoint: Annotated[str, typer.Option(help="best (on validation) or last")] = "best",
    force: Annotated[bool, typer.Option("--force", help="replace an export that is there")] = False,
    debug: Debug = False,
) -> None:
    """Write the trained network for others to use: checked against TailSeg's own prediction, with a model card."""
    from rich.markup import escape

    from tailseg import app

    if checkpoint not in ("best", "last"):
        raise typer.BadParameter(f"'{checkpoint}' is no checkpoint; use best or last")
    with console.status("exporting") as status:
        done = app.export(
            run, format_, out, fold=fold, checkpoint=checkpoint, force=force, say=lambda text: status.update(text)
        )
    said = [f"{done.folder}: {', '.join(done.files)}", *done.checked.sentences(), *done.notes, f"use: {done.usage}"]
    for line in said:
        console.print(escape(line), highlight=False, soft_wrap=True)


@cli.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="folder of predicted label files")],
    reference: Annotated[
        Path, typer.Argument(help="folder of reference label files of the same names, or their data set")
    ],
    protocol: Annotated[
        list[str] | None, typer.Option(help="set of rules, repeatable; see `tailseg list protocols`")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder for the tables; default: the predictions'")] = None,
    workers: Workers = 2,
    debug: Debug = False,
) -> None:
    """Score label files against reference label files, per case and class."""
    from tailseg import app
    from tailseg.evaluate.summary import summary_table

    with _progress("scoring") as report:
        summaries = app.evaluate(predictions, reference, protocol or ["native"], out, workers=workers, report=report)
    for summary in summaries.values():
        console.print(summary_table(summary))
    if left_out := app.unpredicted(predictions, reference):
        console.print(f"{len(left_out)} references have no prediction and are not scored")
    console.print(f"per case and class: {out or predictions}/<protocol>.csv; summaries: <protocol>.json")


@cli.command(name="report")
def report_(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders of runs, or of `tailseg run`")],
    out: Annotated[Path | None, typer.Option(help="HTML file to write; default <first folder>/report.html")] = None,
    protocol: Annotated[
        str | None, typer.Option(help="whose scores to show; default: native where there are any")
    ] = None,
    cases: Annotated[int, typer.Option(min=0, help="scans to show, as slices and in 3D")] = 30,
    debug: Debug = False,
) -> None:
    """One offline HTML page about runs: did the unlabelled scans help, every class, curves, slices, and the scans in 3D."""
    from tailseg import app

    with _progress("drawing") as progress:
        path = app.report(runs, out, protocol=protocol, cases=cases, progress=progress)
    told = f"{path} ({path.stat().st_size / 1e6:.1f} MB); it shows scans: pass it on only where they may go"
    console.print(told, markup=False, highlight=False, soft_wrap=True)


@cli.command(name="list")
def list_(
    kind: Annotated[str | None, typer.Argument(help=f"one of {', '.join(KINDS)}")] = None, debug: Debug = False
) -> None:
    """What there is to choose from."""
    from rich.table import Table

    from tailseg.options import suggest

    if kind is not None and kind not in KINDS:
        raise typer.BadParameter(f"nothing is listed under '{kind}'. {suggest(kind, KINDS)}")
    if kind == "methods":
        console.print(_method_table())
        console.print("`tailseg show <name>` tells the idea, the algorithm, the deviations and the options.")
        return
    for each in KINDS if kind is None else (kind,):
        console.print(f"[bold]{each}[/bold]")
        rows = Table.grid(padding=(0, 2), expand=True)
        rows.add_column(style="cyan", no_wrap=True)
        rows.add_column(ratio=1)
        for name, text in _listing(each).items():
            rows.add_row(f"  {name}", text if kind else text.splitlines()[0])
        console.print(rows)


def _method_table() -> Any:
    """One row a method, grouped by family; cost is the time of a training step relative to supervised."""
    from rich.table import Table

    from tailseg.components import method_cards, plugins

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("name", style="cyan", no_wrap=True)
    table.add_column("family", no_wrap=True)
    for heading in ("venue", "needs"):
        table.add_column(heading)
    table.add_column("cost", justify="right", no_wrap=True)
    for card in method_cards():
        needs, more, _ = card.needs.partition(";")
        table.add_row(card.name, card.family, card.venue, needs.rstrip(".") + (" ..." if more else ""), card.cost)
    for name, entry in plugins("methods").items():
        table.add_row(name, "plug-in", "", entry.value, "")
    return table


def _listing(kind: str) -> dict[str, str]:
    from tailseg.components import builtin_names, plugins, summary

    if kind == "methods" or kind == "networks":
        found = {name: summary(kind, name) for name in builtin_names(kind)}
        return found | {name: f"plug-in {entry.value}" for name, entry in plugins(kind).items()}
    if kind == "weighters":
        from tailseg.parts.class_weights import WEIGHTERS

        return {name: (weighter.__doc__ or "").splitlines()[0] for name, weighter in WEIGHTERS.items()}
    if kind == "preparations":
        from tailseg.data.prepare import PREPARATIONS

        return {name: preparation.describe() for name, preparation in PREPARATIONS.items()}
    from tailseg.evaluate.protocols import PROTOCOLS

    return {name: protocol.describe() for name, protocol in PROTOCOLS.items()}


@cli.command()
def show(
    what: Annotated[str, typer.Argument(help="a recipe file, the folder of a run, or the name of a method or network")],
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """A recipe with every default filled in, or a method or network with its options."""
    from tailseg.components import builtin_names
    from tailseg.options import OptionError, suggest

    path = Path(what) / "recipe.yaml" if Path(what).is_dir() else Path(what)
    if path.is_file():
        from rich.syntax import Syntax

        from tailseg.recipe import load_recipe

        console.print(Syntax(load_recipe(path, overrides or []).to_yaml(), "yaml", background_color="default"))
        return
    for kind in ("methods", "networks"):
        if what in builtin_names(kind):
            _show_component(kind, what)
            return
    known = [*builtin_names("methods"), *builtin_names("networks")]
    raise OptionError(f"'{what}' is no file, run, method or network. {suggest(what, known)}")


def _show_component(kind: Any, name: str) -> None:
    from rich.markup import escape
    from rich.table import Table

    from tailseg.components import component_options, method_card, summary

    console.print(f"[bold]{escape(summary(kind, name))}[/bold]", highlight=False)
    if kind == "methods":
        card = method_card(name)
        fields = Table.grid(padding=(0, 2))
        fields.add_column(style="cyan", no_wrap=True)
        fields.add_column(overflow="fold")
        for field in ("paper", "family", "needs", "cost", "idea", "algorithm", "constants", "deviations"):
            fields.add_row(field, escape(getattr(card, field)))
        console.print(fields, highlight=False)
    table = Table("option", "type", "default", "meaning", title=f"options of {name}", title_justify="left")
    for option in component_options(kind, name):
        default = "must be set" if option.default is None else option.default
        key = f"{kind.removesuffix('s')}.{option.name}"
        table.add_row(key, escape(option.type), escape(default), escape(option.meaning))
    console.print(table)


teacher = typer.Typer(
    name="teacher", help="Foundation models that methods learn from.", no_args_is_help=True, rich_markup_mode="rich"
)
cli.add_typer(teacher)


@teacher.command()
def check(
    source: Annotated[
        str,
        typer.Argument(
            metavar="PATH_OR_ID",
            help="folder with config.json and model.safetensors; or the name of a model in the local cache of the "
            "Hugging Face hub, e.g. facebook/dinov3-vitb16-pretrain-lvd1689m; or random-tiny",
        ),
    ],
    debug: Debug = False,
) -> None:
    """Can these DINOv3 weights be used, what are they, under which licence? Nothing is downloaded.

    Exits with 0 if a method can learn from them, with 1 if not, and then says how to get weights.
    """
    from rich.markup import escape
    from rich.table import Table

    from tailseg.parts.dense_teacher import DINOv3, TeacherError, licence_of

    model = DINOv3(source)
    try:
        parameters = model.try_out()
    except TeacherError as error:
        errors.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    facts, folder = model.facts, None if model.is_random else model.folder()
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="cyan", no_wrap=True)
    rows.add_row("architecture", facts.architecture)
    rows.add_row("patch size", f"{facts.patch_size} pixels")
    rows.add_row("width", f"{facts.width} channels")
    rows.add_row("layers", str(facts.layers))
    rows.add_row("register tokens", str(facts.registers))
    rows.add_row("parameters", f"{parameters:,}")
    rows.add_row("licence", escape(licence_of(folder)) if folder else "none: there are no learnt weights")
    rows.add_row("read from", escape(str(folder)) if folder else "nowhere: drawn with a fixed seed")
    console.print(rows)
    if model.is_random:
        console.print("[yellow]RANDOM WEIGHTS:[/yellow] they try a method out; no result made with them counts.")
    console.print(f"can be used: method.teacher={escape(source)}", highlight=False, soft_wrap=True)


@cli.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for data, run, predictions and report")] = Path("demo"),
    data_only: Annotated[
        bool, typer.Option("--data-only", help="only make the scans, and a recipe for them, to play with")
    ] = False,
    debug: Debug = False,
) -> None:
    """The main job on synthetic abdomens: make them, then `tailseg run` with DHC and the labelled-only reference."""
    from tailseg.demo import make_demo_data, run_demo

    if data_only:
        data, recipe = make_demo_data(out)
        console.print(f"data set {data}, recipe {recipe}", highlight=False, soft_wrap=True)
        return
    _tell(run_demo(out, _say_when, _progress))


@cli.command()
def doctor(
    store: Annotated[Path, typer.Option(help="folder for the prepared scans, whose disk counts")] = Path("stores"),
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="also time a convolution and a copy, for a second")
    ] = True,
    json_: Annotated[bool, typer.Option("--json", help="write the facts as JSON, and nothing else")] = False,
    debug: Debug = False,
) -> None:
    """What this machine offers, what a run would use of it, and what is missing.

    Exits with 1 if nothing can run here: torch cannot be imported, or a package that all need is missing or too old.
    """
    from tailseg.doctor import examine, findings_table

    findings = examine(store, measure=measure)
    if json_:
        import json

        typer.echo(json.dumps(findings.to_dict(), indent=1, allow_nan=False))
    else:
        console.print(findings_table(findings), highlight=False)
    if findings.problems:
        raise typer.Exit(1)


def _say_when(text: str) -> None:
    from rich.markup import escape

    console.print(f"[dim]{time.strftime('%H:%M')}[/dim] {escape(text)}", highlight=False, soft_wrap=True)


def _tell(done: "Finished") -> None:
    """What came out of a run, the answer last."""
    from rich.markup import escape

    from tailseg.evaluate.verdict import verdict_table

    if done.verdict:
        console.print(verdict_table(done.verdict))
        console.print(f"[bold]{escape(done.verdict.sentence)}[/bold]", highlight=False, soft_wrap=True)
    lines = [f"networks     {', '.join(str(member) for member in done.members)}"]
    lines += [f"predictions  {done.predictions}"] if done.predictions else []
    lines += [f"report       {done.report}  ({done.seconds / 60:.0f} min)"]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


class _progress:
    """A rich progress bar over cases that appears with the first one; steps aside when it is full. In a terminal only."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.bar: Any = None

    def __enter__(self) -> "_progress":
        return self

    def __call__(self, done: int, total: int, case: str) -> None:
        from rich.progress import Progress

        if not console.is_terminal:  # a log file would get empty lines
            return
        if self.bar is None:
            self.bar = Progress(console=console, transient=True)
            self.bar.start()
            self.task = self.bar.add_task(self.what, total=total)
        self.bar.update(self.task, completed=done, description=f"{self.what} {case}")
        if done == total:
            self.__exit__()

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def main() -> None:
    """Run the command; errors of the user's making are one or two lines, with --debug a traceback."""
    debug = "--debug" in sys.argv
    try:
        code = cli(standalone_mode=False)
    except Exception as error:
        if debug:
            raise
        code = _say(error)
    except KeyboardInterrupt:
        errors.print("stopped")
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def _say(error: Exception) -> int:
    from rich.markup import escape

    if isinstance(error, typer.Exit):
        return error.exit_code
    message = error.format_message() if hasattr(error, "format_message") else str(error)  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(error, ValueError | OSError) or hasattr(error, "format_message") or _is_ours(error):
        errors.print(f"[red]error:[/red] {escape(message)}", highlight=False, soft_wrap=True)
        return 2
    errors.print(f"[red]{type(error).__name__}:[/red] {escape(message)}", highlight=False, soft_wrap=True)
    errors.print("This looks like a fault of TailSeg; run again with --debug for the traceback.", highlight=False)
    return 1


def _is_ours(error: Exception) -> bool:
    return type(error).__module__.startswith("tailseg.")


if __name__ == "__main__":
    main()
