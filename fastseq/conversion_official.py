"""``fastseq convert --from``: the checkpoints of the papers' own code. Imports what it needs when it is called."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from fastseq.convert import Official

STATE, SCHEDULE = ".pt", ".json"  # targets beside those of deployed models


class Family(NamedTuple):
    """One code base."""

    read: Callable[[argparse.Namespace], Any]  # Official, or for the target .json a dict with "notes"
    needs: tuple[str, ...]  # options that say what its files do not
    takes: tuple[str, ...]  # other options
    hint: str  # where its own files hold more than tensors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the subcommand."""
    group = parser.add_argument_group(
        "official checkpoints",
        f"of the papers' own code. A TARGET that ends in {STATE} is a state_dict of the module that is then told, to "
        f"train on; {SCHEDULE} is for adaptdl: the arguments of fastseq.recipes.LEGW",
    )
    group.add_argument("--from", dest="family", choices=tuple(FAMILIES), help="whose code wrote SOURCE")
    group.add_argument("--state", metavar="NAME", help="of several in the file, such as avg_state_dict_0.998000")
    group.add_argument("--members", type=int, metavar="M", help="torch-uncertainty: num_estimators")
    group.add_argument("--activation", metavar="NAME", help="torch-uncertainty: of mimo_mlp (default: relu)")
    group.add_argument("--base-batch", type=int, metavar="N", help="adaptdl: batch_size of its AdaptiveDataLoader")
    group.add_argument("--base-warmup-epochs", type=float, metavar="E", help="adaptdl: of its LEGWScale")
    group.add_argument("--examples", type=int, metavar="N", help="adaptdl: data_size of its LEGWScale")
    group.add_argument("--batch", type=int, metavar="N", help="adaptdl: examples of a step from here on")
    group.add_argument("--epochs", type=float, metavar="E", help="adaptdl: of the whole training")


def problem(arguments: argparse.Namespace) -> str:
    """What is wrong with the options, or nothing."""
    given = [name for name in _ALL if getattr(arguments, name) not in (None, False)]
    if arguments.family is None:
        own = [name for name in given if name not in _OF_CHECKPOINTS]
        return f"{_flags(own)} go with --from" if own else ""
    family = FAMILIES[arguments.family]
    missing = [name for name in family.needs if name not in given]
    if missing:
        return f"--from {arguments.family} needs {_flags(missing)}, which its files do not tell"
    wrong = [name for name in given if name not in family.needs + family.takes]
    if wrong:
        return f"--from {arguments.family} has no use for {_flags(wrong)}"
    schedule = arguments.family == "adaptdl"
    if schedule != (arguments.target.suffix == SCHEDULE):
        return f"TARGET must {'' if schedule else 'not '}end in {SCHEDULE} with --from {arguments.family}"
    if arguments.weights and arguments.target.suffix in (STATE, SCHEDULE):
        return f"--weights is for deployed models, not for {arguments.target.suffix}"
    return ""


def _flags(names: list[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def read(arguments: argparse.Namespace, notes: list[str]) -> dict[str, Any]:
    """What is to be written to the target, by its suffix.

    Raises:
        ConversionError: it cannot be read, or there is no place for it in the target.
    """
    from fastseq.convert import ConversionError

    family = FAMILIES[arguments.family]
    try:
        found = family.read(arguments)
    except pickle.UnpicklingError as error:
        more = f"{arguments.source}: broken, or it holds more than tensors and is not read, because that could run code"
        raise ConversionError(f"{more}. {family.hint}") from error
    if arguments.family == "adaptdl":
        notes += found.pop("notes")
        return dict(found)
    official: Official = found
    notes += official.notes
    if arguments.target.suffix == STATE:
        notes.append(f"load it into {official.module}")
        return official.state
    if official.model is None:
        raise ConversionError(f"{official.why_not}; a TARGET that ends in {STATE} takes it")
    return official.model


def _tensors(arguments: argparse.Namespace) -> dict[str, Any]:
    from fastseq.convert.checkpoint import tensors_of

    return tensors_of("convert", arguments.source, arguments.state)


def _g2_lstm(arguments: argparse.Namespace) -> Official:
    from fastseq.convert import from_g2_lstm

    fields: dict[str, dict[str, Any]] = {}
    for module, name, value in arguments.field or ():
        fields.setdefault(module, {})[name] = value
    return from_g2_lstm(_tensors(arguments), fields=fields)


def _torch_uncertainty(arguments: argparse.Namespace) -> Official:
    from fastseq.convert import from_torch_uncertainty

    options = {} if arguments.activation is None else {"activation": arguments.activation}
    return from_torch_uncertainty(_tensors(arguments), arguments.members, **options)


def _distsup(arguments: argparse.Namespace) -> Official:
    import torch

    from fastseq import export_state
    from fastseq._check import ArgumentError
    from fastseq.convert import Official
    from fastseq.nn import load_codebooks

    named = {name: torch.as_tensor(value) for name, value in _tensors(arguments).items()}
    module = load_codebooks(named, arguments.prefix or "", "distsup")
    model, why_not = None, ""
    try:
        model = export_state(module)
    except ArgumentError as error:
        why_not = str(error)
    notes = [
        "only the bottleneck is taken; encoder and decoder are described in the run's train_config.yaml alone",
        "the file does not hold the weight of the commitment loss (0.25 unless its configuration said otherwise), nor "
        "how it re-estimated its codes: for training give these to the module (commitment_weight, reinit)",
    ]
    state = {name: value.numpy() for name, value in module.state_dict().items()}
    whole = isinstance(module, torch.nn.Sequential)
    what = "an nn.Sequential of batch_norm, projection and vq" if whole else "a VectorQuantize"
    made = f'what fastseq.nn.load_codebooks(TENSORS, kind="distsup") makes, {what}'
    return Official(state, made, model, why_not, notes)


def _adaptdl(arguments: argparse.Namespace) -> dict[str, Any]:
    from fastseq.convert import from_adaptdl

    return from_adaptdl(arguments.source, **{name: getattr(arguments, name) for name in FAMILIES["adaptdl"].needs})


_SAVED = "Where that code is: torch.save(torch.load(PATH).state_dict(), 'state.pt'), and convert this"
_PARTS = "Where that code is: torch.save(torch.load(PATH)['state_dict'], 'state.pt'), and convert this"
FAMILIES = {
    "g2-lstm": Family(_g2_lstm, (), ("field", "state"), f"Its main.py saves the whole module. {_SAVED}"),
    "distsup": Family(_distsup, (), ("prefix", "state"), _PARTS),
    "torch-uncertainty": Family(_torch_uncertainty, ("members",), ("activation", "state"), _PARTS),
    "adaptdl": Family(
        _adaptdl, ("base_batch", "base_warmup_epochs", "examples", "batch", "epochs"), (), "Is it its state of a job?"
    ),
}
_OF_CHECKPOINTS = ("prefix", "order", "field", "input", "output", "dequantize")  # conversion.py says when
_ALL = (
    *_OF_CHECKPOINTS,
    *dict.fromkeys(name for f in FAMILIES.values() for name in f.needs + f.takes if name not in _OF_CHECKPOINTS),
)
