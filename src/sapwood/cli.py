"""The command line. Torch is imported by the commands that need it, never to print help.

Exit codes: 0 done, 1 an error that a sentence on stderr explains, 2 wrong usage, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sapwood.commands import Command, checkpoints, pipeline, replay, report, train, view
from sapwood.commands.shared import load, positive, recipe_arguments, show_progress
from sapwood.errors import ConfigError, DataError, ModelError, SapwoodError, printable

if TYPE_CHECKING:
    from sapwood.config import Recipe

WIDTH = 100


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(given)
    except SystemExit as stop:  # argparse's help and usage errors
        return stop.code if isinstance(stop.code, int) else 2
    except SapwoodError as error:
        if _verbose(given):
            traceback.print_exc()
        # A library's own words may hold what a terminal would obey.
        told = "\n".join(printable(line, len(line)) for line in str(error).splitlines())
        print(f"sapwood: {told}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = "; what is done is kept, and the same command goes on from there" if _goes_on(given) else ""
        print(f"sapwood: stopped by Ctrl-C{kept}.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `sapwood list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        told = _out_of_memory(error)
        if told is None:
            raise
        if _verbose(given):
            traceback.print_exc()
        print(f"sapwood: {told}", file=sys.stderr)
        return 1


def _out_of_memory(error: Exception) -> str | None:
    """What to tell where memory ran out in a place that can't do with less; None for any other error."""
    if "torch" not in sys.modules:
        return None
    from sapwood.memory import is_out_of_memory

    if not is_out_of_memory(error):
        return None
    return "memory ran out; `sapwood train RECIPE --plan` says what a run needs and which option makes it smaller."


def _dispatch(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help"):
        print(top_help())
        return 0 if given else 2
    if given[0] == "--version":
        from sapwood.environment import version

        print(f"sapwood {version('sapwood')}")
        return 0
    if given[0] == "--dump-help":
        print(dump_help())
        return 0
    command = " ".join(given[:2]) if " ".join(given[:2]) in COMMANDS else given[0]
    if command == "data":
        if given[1:] in (["-h"], ["--help"]):
            print(_help_of_data())
            return 0
        print(f"sapwood data: name what to do.\n{_help_of_data()}", file=sys.stderr)
        return 2
    if command not in COMMANDS:
        near = difflib.get_close_matches(given[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(COMMANDS)}."
        print(f"sapwood: unknown command {given[0]!r}; {hint}", file=sys.stderr)
        return 2
    namespace = parser(command).parse_intermixed_args(given[len(command.split()) :])
    return COMMANDS[command].run(namespace)


def _goes_on(given: Sequence[str]) -> bool:
    """Whether a command that is interrupted is continued by repeating it."""
    writes = any(word.partition("=")[0] == "--out" for word in given)
    return given[0] == "pipeline" or list(given[:2]) == ["data", "prepare"] or (given[0] == "generate" and writes)


def _verbose(given: Sequence[str]) -> bool:
    return "-v" in given or "--verbose" in given


# ---- help ---------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Offers the nearest option or choice for one that there isn't."""

    def error(self, message: str) -> NoReturn:
        """As the base class: usage, the sentence, exit code 2."""
        wrong, words = "", list[str]()
        if unknown := re.match(r"unrecognized arguments: (--?[\w-]+)", message):
            wrong, words = unknown.group(1), [word for action in self._actions for word in action.option_strings]
        elif unknown := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            wrong, words = unknown.group(1), [word.strip(" '") for word in unknown.group(2).split(",")]
        near = difflib.get_close_matches(wrong, words, n=1)
        super().error(f"{message}; did you mean {near[0]!r}?" if near else message)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a seed, which is 0 or more")
    return int(text)


def parser(name: str) -> argparse.ArgumentParser:
    """The argument parser of a command."""

    def formatter(prog: str) -> argparse.HelpFormatter:
        return argparse.HelpFormatter(prog, max_help_position=28, width=WIDTH)

    made = _Parser(
        prog=f"sapwood {name}", description=COMMANDS[name].summary, formatter_class=formatter, allow_abbrev=False
    )
    COMMANDS[name].arguments(made)
    made.add_argument("-v", "--verbose", action="store_true", help="show the traceback of an error")
    return made


def top_help() -> str:
    """Help of `sapwood` itself."""
    lines = [f"  {name:<12} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: sapwood COMMAND ...",
            "",
            "Reinforcement post-training of language-model agents on token trees.",
            "",
            "commands:",
            *lines,
            "",
            "`sapwood COMMAND --help` explains a command; `sapwood --version` prints the version.",
        ]
    )


def _help_of_data() -> str:
    lines = [f"  {name:<12} {command.summary}" for name, command in COMMANDS.items() if name.startswith("data ")]
    return "\n".join(["usage: sapwood data check|prepare|tasks|pairs ...", "", "commands:", *lines])


def dump_help() -> str:
    """Help of every command, as docs/cli.md holds it."""
    parts = [top_help(), *(parser(name).format_help().rstrip() for name in COMMANDS)]
    return "\n\n".join(f"```text\n{part}\n```" for part in parts)


def _rollout_arguments(made: argparse.ArgumentParser) -> None:
    recipe_arguments(made)
    made.add_argument("--tasks", type=positive, default=4, metavar="N", help="how many tasks (4)")
    made.add_argument("--split", choices=("train", "eval"), default="eval", help="which tasks (eval)")
    made.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSONL file to write, a line a rollout")


def _eval_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "recipe",
        nargs="+",
        metavar="RECIPE|RUN|MODEL|KEY=VALUE",
        help="a recipe with overlays and overrides, a run folder, or (with --data) any model or adapter",
    )
    made.add_argument("--device", metavar="NAME", help="short for model.device=...: auto, cpu, cuda or cuda:1")
    made.add_argument("--algorithm", metavar="NAME", help="what measures --data of a model: sft (default), dpo, reward")
    made.add_argument(
        "--adapter",
        type=Path,
        action="append",
        metavar="PATH",
        help="an adapter, checkpoint or run to put beside the base; may be repeated",
    )
    made.add_argument(
        "--data", type=Path, metavar="FILE", help="measure this data, or the perplexity of this text (.txt, .md)"
    )
    made.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="a further metric of the replies, as under eval.metrics, options too: '{name: pass_at_k, k: 4}'",
    )
    made.add_argument(
        "--tasks", type=positive, metavar="N", help="held-out tasks or records (the recipe's eval.tasks, max_samples)"
    )
    made.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write the tables to")
    made.add_argument("--json", action="store_true", help="print the tables as JSON")


def _generate_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("model", metavar="MODEL|RUN", help="a model's name, folder or hub id, an adapter or a run folder")
    source = made.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="TEXT", help="a user message; may be repeated")
    source.add_argument(
        "--input", type=Path, metavar="FILE", help='JSONL with a "prompt" (text or messages) a line, or any data file'
    )
    made.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="JSONL file to write; a run that was killed is continued (default: print)",
    )
    made.add_argument("--n", type=positive, default=1, metavar="N", help="replies to each prompt (1)")
    made.add_argument("--system", metavar="TEXT", help="a system message before every prompt")
    made.add_argument("--field", metavar="NAME", help="the field of the input that holds the prompt (prompt)")
    made.add_argument("--chat-template", type=Path, metavar="FILE", help="a Jinja template in place of the model's own")
    made.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 is greedy (1.0)")
    made.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K most probable tokens; 0 keeps all")
    made.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="keep the smallest set with this mass (1.0)"
    )
    made.add_argument("--min-p", type=float, default=0.0, metavar="P", help="drop below this share of the top (0.0)")
    made.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="length of a reply (128)")
    made.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; may be repeated")
    made.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of the sampling (0)")
    made.add_argument("--batch", type=positive, default=32, metavar="N", help="replies sampled, then written, together")
    made.add_argument("--dtype", metavar="NAME", help="type of the weights: auto, float32, bfloat16 or float16")
    made.add_argument("--device", metavar="NAME", help="where to run: auto, cpu, cuda or cuda:1")


def _export_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("run", type=Path, metavar="RUN", help="a run folder, a checkpoint or an adapter")
    made.add_argument("out", type=Path, metavar="OUT", help="folder to write; it must not exist yet, or be empty")
    made.add_argument("--base", metavar="NAME", help="where the adapter's base is, unless the name it gives")
    made.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="type of the weights (float32)"
    )
    made.add_argument("--role", choices=("policy", "critic"), default="policy", help="which model of a run (policy)")


def _data_check_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("files", nargs="+", metavar="FILE", help="JSON, JSONL, CSV or Parquet, a folder or a hub id")
    made.add_argument("--model", metavar="NAME", help="measure lengths in this model's tokens, by its chat template")
    made.add_argument("--chat-template", type=Path, metavar="FILE", help="a Jinja template in place of the model's own")
    made.add_argument(
        "--field", action="append", default=[], metavar="KEY=VALUE", help="as in data: input=problem, split=train ..."
    )
    made.add_argument("--json", action="store_true", help="print the report as JSON")


def _data_tasks_arguments(made: argparse.ArgumentParser) -> None:
    recipe_arguments(made)
    made.add_argument("--count", type=positive, required=True, metavar="N", help="how many tasks")
    made.add_argument("--split", choices=("train", "eval"), default="train", help="which tasks (train)")
    made.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSONL file to write")


def _data_pairs_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("rollouts", type=Path, metavar="ROLLOUTS", help="a file of `sapwood rollout`")
    made.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSONL file to write")
    made.add_argument("--per-task", type=positive, default=1, metavar="N", help="at most so many pairs of a task (1)")
    made.add_argument("--min-gap", type=float, default=0.0, metavar="R", help="rewards must differ by more (0)")
    made.add_argument("--answers", action="store_true", help="a task's own answer counts as a reply with reward 1")
    made.add_argument("--shuffle", action="store_true", help="draw which is chosen: the twin that teaches nothing")
    made.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of the choice among equals (0)")


def _data_prepare_arguments(made: argparse.ArgumentParser) -> None:
    names = ("hh-rlhf", "belle", "alpaca-chinese", "all")
    made.add_argument("sets", nargs="+", choices=names, metavar="SET", help=f"which sets: {', '.join(names)}")
    made.add_argument("--input", type=Path, metavar="PATH", help="a local copy of the set (default: from the hub)")
    made.add_argument("--output", type=Path, default=Path("data"), metavar="DIR", help="where files go (data)")
    made.add_argument("--max-samples", type=positive, metavar="N", help="records of each file (all)")
    made.add_argument("--split", action="append", default=[], metavar="NAME", help="only this split; may be repeated")
    made.add_argument("--subset", action="append", default=[], metavar="NAME", help="only this folder of hh-rlhf")


def _list_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("kind", nargs="?", choices=KINDS, help="only this kind")


def _doctor_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs go (runs)")


# ---- commands -----------------------------------------------------------------------------------------------


def _rollout(arguments: argparse.Namespace) -> int:
    recipe = load(arguments)
    with show_progress() as progress:
        from sapwood.evaluate import run_rollout

        run_rollout(recipe, arguments.split, arguments.tasks, arguments.out, progress.work)
    print(arguments.out)
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    first = arguments.recipe[0]
    is_recipe = Path(first).suffix in (".yaml", ".yml") or (Path(first) / "recipe.yaml").is_file()
    adapters = arguments.adapter
    if is_recipe:
        if arguments.algorithm:
            raise ConfigError("--algorithm is for a model with --data; a recipe names its own: algorithm.name=...")
        recipe = load(arguments)
        adapters = adapters or ([Path(first)] if Path(first).is_dir() else None)
    else:
        recipe, adapters = _recipe_of_model(arguments)
    from sapwood.compare import BASE, run_eval, with_metrics

    recipe = with_metrics(recipe, [_metric(text) for text in arguments.metric])
    if arguments.out is not None and arguments.out.is_dir():
        raise ConfigError(f"--out {arguments.out} is a folder; give the name of a file in it.")
    with show_progress() as progress:
        found = run_eval(
            recipe,
            adapters,
            arguments.tasks,
            progress.work,
            data=arguments.data,
            base_name=BASE if is_recipe or adapters else Path(first).name,
        )
    told = json.dumps(found.to_json(), indent=2, sort_keys=True)
    if arguments.out:
        from sapwood.run import writing

        with writing(arguments.out):
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(told + "\n", encoding="utf-8")
    if arguments.json:
        print(told)
    else:
        from rich.console import Console

        Console().print(found.render())
    return 0


def _recipe_of_model(arguments: argparse.Namespace) -> tuple[Recipe, list[Path] | None]:
    """What measures a model, an adapter or a checkpoint on --data, and the adapters to put beside it."""
    first, *rest = arguments.recipe
    if arguments.data is None:
        raise ConfigError(
            f"{first!r} is no recipe (.yaml) and no run folder: name one, or give --data FILE to measure a model on."
        )
    if rest:
        raise ConfigError(f"{rest[0]!r} overrides a recipe, but {first!r} is a model; leave it out.")
    if not arguments.data.exists():
        raise DataError(f"--data: there is no file {str(arguments.data)!r}.")
    from sapwood.compare import recipe_for
    from sapwood.opening import locate

    options = {"device": arguments.device} if arguments.device else {}
    origin = locate(first, **options)
    recipe = recipe_for(origin, arguments.data, arguments.algorithm)
    if arguments.adapter and origin.section.init_from is not None:
        raise ConfigError(f"--adapter: {first!r} is an adapter or a checkpoint itself; name its base, or give both.")
    if origin.section.init_from is None:
        return recipe, arguments.adapter
    base = recipe.model.model_copy(update={"init_from": None})
    return recipe.model_copy(update={"model": base}), [Path(first)]


def _metric(text: str) -> dict[str, Any]:
    """A name, or a mapping in YAML's short form."""
    import yaml

    from sapwood.configfile import parse_value

    if not text.lstrip().startswith("{"):
        return {"name": text}
    try:
        found = parse_value(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--metric: {text!r} isn't a mapping such as '{{name: pass_at_k, k: 4}}'.") from error
    return dict(found)


def _generate(arguments: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from sapwood.engines import Sampling

    try:
        sampling = Sampling(
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            min_p=arguments.min_p,
            max_new_tokens=arguments.max_new_tokens,
            stop=tuple(arguments.stop),
        )
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        problem = first["msg"].replace("Input should be", "it should be")
        raise ConfigError(f"--{option} is {first['input']!r}; {problem}.") from error
    if arguments.input is not None and not arguments.input.exists():
        raise DataError(f"--input: there is no file {str(arguments.input)!r}.")
    from sapwood.opening import locate

    names = ("dtype", "device", "chat_template")
    origin = locate(arguments.model, **{name: getattr(arguments, name) for name in names if getattr(arguments, name)})
    with show_progress() as progress:
        from sapwood.generate import run_generate

        replies = run_generate(
            origin,
            arguments.prompt or (),
            arguments.input,
            arguments.out,
            sampling,
            arguments.seed,
            progress.work,
            prompt_field=arguments.field,
            system=arguments.system,
            n=arguments.n,
            batch=arguments.batch,
        )
    print(arguments.out if arguments.out else "\n\n".join(record["reply"] for record in replies))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    if not arguments.run.exists():
        raise ModelError(f"there is no run, checkpoint or adapter {str(arguments.run)!r}.")
    with show_progress() as progress:
        progress.phase("exporting")
        from sapwood.models.export import export

        export(arguments.run, arguments.out, base=arguments.base, dtype=arguments.dtype, role=arguments.role)
    print(arguments.out)
    return 0


def _data_check(arguments: argparse.Namespace) -> int:
    from sapwood.data.check import check

    options = dict(item.partition("=")[::2] for item in arguments.field)
    with show_progress() as progress:
        chat = None
        if arguments.model:
            from sapwood.opening import locate, open_chat

            template = {"chat_template": arguments.chat_template} if arguments.chat_template else {}
            chat = open_chat(locate(arguments.model, **template))
        elif arguments.chat_template:
            raise ConfigError("--chat-template is tried with a model's tokenizer: give --model too.")
        report = check(arguments.files, options, chat, progress.work)
    print(json.dumps(report.to_json(), indent=2, ensure_ascii=False) if arguments.json else "\n".join(report.lines()))
    return 0 if report.good else 1


def _data_tasks(arguments: argparse.Namespace) -> int:
    from sapwood.data.tasks import write_tasks

    recipe = load(arguments)
    count = write_tasks(recipe.build_env(), arguments.split, arguments.count, recipe.run.seed, arguments.out)
    print(f"{arguments.out}: {count:,} tasks with their answers")
    return 0


def _data_pairs(arguments: argparse.Namespace) -> int:
    from sapwood.data.pairs import write_pairs

    counts = write_pairs(
        arguments.rollouts,
        arguments.out,
        per_task=arguments.per_task,
        min_gap=arguments.min_gap,
        answers=arguments.answers,
        shuffle=arguments.shuffle,
        seed=arguments.seed,
    )
    print(f"{arguments.out}: {counts.pairs:,} pairs of {counts.tasks:,} tasks ({counts.even:,} without a better reply)")
    return 0


def _data_prepare(arguments: argparse.Namespace) -> int:
    from sapwood.data.prepare import SETS, prepare

    names = list(SETS) if "all" in arguments.sets else arguments.sets
    if arguments.input is not None and len(names) > 1:
        raise ConfigError("--input is a copy of one set, but several are named; prepare them one by one.")
    for name in names:
        with show_progress() as progress:
            made = prepare(
                name,
                arguments.output,
                source=arguments.input,
                max_samples=arguments.max_samples,
                splits=arguments.split,
                subsets=arguments.subset,
                progress=progress.work,
            )
        for file in made:
            skipped = f", {file.bad:,} bad left out; the first: {file.problems[0]}" if file.bad else ""
            print(f"{file.path}: {file.records:,} records{skipped}{' (was complete)' if file.already else ''}")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from sapwood import catalogue

    for kind in [arguments.kind] if arguments.kind else KINDS:
        print(f"{kind}:")
        for entry in catalogue.entries(kind):
            print(f"  {entry.name:<22} {entry.summary}".rstrip())
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from sapwood import doctor
    from sapwood.progress import quiet

    quiet()
    return 0 if doctor.report(arguments.runs, lambda line: print(line, flush=True)) else 1


KINDS = ("algorithm", "env", "engine", "reward", "metric", "tracker", "recipe", "model", "building", "climate")
COMMANDS = {
    "train": train.COMMAND,
    "pipeline": pipeline.COMMAND,
    "checkpoints": checkpoints.COMMAND,
    "replay": replay.COMMAND,
    "report": report.COMMAND,
    "view": view.COMMAND,
    "rollout": Command("Play tasks with the recipe's model and write what happened.", _rollout_arguments, _rollout),
    "eval": Command("Measure models on held-out tasks and data, side by side.", _eval_arguments, _eval),
    "generate": Command("Reply to prompts with a model or a trained run.", _generate_arguments, _generate),
    "export": Command("Write what a run trained as a plain transformers folder.", _export_arguments, _export),
    "data check": Command(
        "Say what is in data files: bad records, repeats, lengths.", _data_check_arguments, _data_check
    ),
    "data tasks": Command(
        "Write an environment's tasks and answers as demonstrations.", _data_tasks_arguments, _data_tasks
    ),
    "data pairs": Command("Turn scored rollouts into preference pairs.", _data_pairs_arguments, _data_pairs),
    "data prepare": Command("Turn public sets into files to learn from.", _data_prepare_arguments, _data_prepare),
    "list": Command("List what a recipe can name.", _list_arguments, _list),
    "doctor": Command("Check what works on this machine, and say how to mend the rest.", _doctor_arguments, _doctor),
}


if __name__ == "__main__":
    sys.exit(main())
