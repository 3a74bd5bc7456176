"""`headrace label`, `annotator`, `preferences`: who may label, where, and what came of it. Only `label` needs Ray."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cluster.commands.arguments import ConfigArgument, OverridesArgument
from cluster.commands.until_signal import run_until_signal
from cluster.loopback import stay_on_loopback
from contracts import loading as configuration
from contracts.config import ConfigError

if TYPE_CHECKING:
    from feedback.store import Store

StoreOption = Annotated[
    str, typer.Option(metavar="FILE_OR_URL", help="the feedback store, as in labelling.store; a new file is made")
]


def label(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Let people label: a page and an API where annotators compare responses. Votes go to `labelling.store`.

    CONFIG needs a section `labelling` and no other; that of a run will do too. Annotators sign in with a token of
    `headrace annotator`. `headrace preferences` makes a preference file of the votes. Ctrl-C or SIGTERM ends.
    """
    settings = configuration.load_labelling(config, overrides or ())
    if settings.ray.address is None:
        stay_on_loopback()
    from cluster.label_command import check_labelling, label  # imports are slow, and `--help` should not be

    job = check_labelling(settings)
    from cluster.progress import Progress

    with Progress(0) as progress:
        _, received = run_until_signal(lambda stopping: label(job, progress, stopping))
    if received is not None:
        raise SystemExit(128 + received)


@contextmanager
def opened(place: str, option: str, *, must_exist: bool) -> Iterator[Store]:
    """The store; whatever it refuses is a ConfigError that names `option`."""
    from feedback.store import Refused, Store  # imports are slow, and `--help` should not be
    from feedback.store.database import file_of

    try:
        file = file_of(place)
        if must_exist and file is not None and not file.is_file():
            raise ConfigError(f"{option}: there is no store {place}")
        with Store(place) as store:
            yield store
    except Refused as refused:
        raise ConfigError(f"{option}: {refused}") from refused


def annotator(
    store: StoreOption,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="whose token; without it everybody is listed")
    ] = None,
    new_token: Annotated[
        bool, typer.Option("--new-token", help="for somebody who lost theirs, which is worth nothing then")
    ] = False,
    deactivate: Annotated[
        bool, typer.Option("--deactivate", help="is neither asked nor heard any more; votes so far stand")
    ] = False,
    export: Annotated[
        Path | None, typer.Option(metavar="FILE", help="all that is stored of this person, as JSON")
    ] = None,
    delete: Annotated[
        bool, typer.Option("--delete", help="all data of this person for good; their tasks are asked again")
    ] = False,
    url: Annotated[str | None, typer.Option(help="of `headrace label`: also print a link that signs in")] = None,
) -> None:
    """Make an annotator's token for `headrace label`. It is printed once; only its hash is kept.

    Without NAME: who there is, how many votes each gave and how many gold checks were right.
    """
    asked = [option for option, given in (("--new-token", new_token), ("--deactivate", deactivate)) if given]
    asked += [option for option, given in (("--export", export is not None), ("--delete", delete)) if given]
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(asked)}: give one of them")
    if name is None and (asked or url):
        raise ConfigError(f"{(asked or ['--url'])[0]}: needs the NAME of an annotator")
    with opened(store, "--store", must_exist=name is None or bool(asked)) as found:
        if name is None:
            _list(found)
        elif deactivate:
            found.set_active(found.find(name), False)
            print(f"{name!r} is not asked any more; what they said stands")
        elif export is not None:
            text = json.dumps(found.export_annotator(found.find(name)), ensure_ascii=False, indent=1)
            _write_new(export, text)
            print(f"wrote {export}")
        elif delete:
            gap = found.delete_annotator(found.find(name))
            print(f"deleted {name!r}: {gap.judgments} judgments on {gap.tasks} tasks")
        else:
            _show_token(found, name, new_token, url, store)


def _list(store: Store) -> None:
    checks = store.gold_checks()
    for person in store.everybody():
        state = ("" if person.has_token else ", no token") if person.active else ", deactivated"
        right, of = checks.get(person.name, (0, 0))
        print(f"{person.name}: {person.votes} votes, {right} of {of} gold checks right{state}")


def _show_token(store: Store, name: str, new_token: bool, url: str | None, place: str) -> None:
    from feedback.store import Refused

    if new_token:
        token = store.new_token(store.find(name))
    else:
        try:
            _, token = store.register(name)
        except Refused as refused:
            if refused.code != "name_taken":
                raise
            raise ConfigError(f"NAME: {refused}; --new-token gives them another token") from refused
    print(f"added {name!r} to {place}; the token is shown here and never again", file=sys.stderr)
    print(token)
    if url is not None:
        print(f"{url.rstrip('/')}/#token={token}")


def _write_new(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text + "\n")
    except OSError as error:
        raise ConfigError(f"--export {path}: cannot be written: {error.strerror}") from error


def preferences(
    store: Annotated[str, typer.Argument(metavar="FILE_OR_URL", help="the feedback store")],
    to: Annotated[Path, typer.Option(metavar="FILE", help=".parquet, .jsonl, .jsonl.gz, or a new datasets folder")],
    kind: Annotated[
        Literal["pair", "label", "thumbs"], typer.Option(help="which judgments; labels and thumbs are unpaired")
    ] = "pair",
    unpaired: Annotated[
        bool, typer.Option("--unpaired", help="of pairs: the responses that were called both bad, as labels")
    ] = False,
    method: Annotated[
        Literal["dawid_skene", "majority"], typer.Option(help="how votes become a probability")
    ] = "dawid_skene",
    layout: Annotated[
        Literal["plain", "conversational"], typer.Option(help="of the texts, as TRL reads both")
    ] = "plain",
    min_votes: Annotated[int, typer.Option(min=0, help="judgments that a task needs")] = 1,
    min_certainty: Annotated[float, typer.Option(min=0.5, max=1, help="of the likelier side")] = 0.5,
    name: Annotated[str, typer.Option(help="of the dataset, whose versions the store keeps")] = "preferences",
) -> None:
    """Make a file for TRL, or for `preferences.path`, of the votes in a store: a probability for each pair."""
    from feedback.exports import check_place
    from feedback.store import DatasetQuery

    check_place(to)
    with opened(store, "FILE_OR_URL", must_exist=True) as found:
        if not len(found.ballots(kind).pairs_N):
            raise ConfigError(f"{store}: holds no votes of kind {kind}: let people label first, with `headrace label`")
        run = found.aggregate(kind, method=method)
        query = DatasetQuery(run.aggregate_id, min_votes=min_votes, min_certainty=min_certainty)
        export = found.export_unpaired if unpaired or kind != "pair" else found.export_preferences
        version = export(name, query, to, layout=layout)
    left_out = ", ".join(f"{reason} {count}" for reason, count in sorted(version.dropped.items()))
    print(
        f"wrote {version.rows} rows to {to}, of {run.judgments} votes on {run.tasks} tasks; "
        f"dataset {version.name}, version {version.version}" + (f"; left out: {left_out}" if left_out else "")
    )
