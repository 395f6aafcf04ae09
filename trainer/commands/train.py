"""Train what a config describes, on as many processes as were started.

lockstep train                                        configs/digits.yaml, on one GPU or the CPU
lockstep train configs/cifar10.yaml batch.size=256    another config, one key changed
lockstep train run.resume=auto                        go on where the run stopped
torchrun --nproc_per_node 8 -m trainer train          the same run on eight GPUs
lockstep train --help optimizer.adamw                 the arguments of a component, or a section's keys

`python train.py` and `python -m trainer train` take the same arguments.
"""

from __future__ import annotations

from trainer.commands.arguments import CommandParser, load_config
from trainer.config.load import help_text
from trainer.config.secrets import remember_argument_secrets
from trainer.errors import ConfigError
from trainer.process.exit import (
    end_on_closed_pipe,
    report_error,
    report_interrupt,
)
from trainer.process.launcher import quiet_torch
from trainer.process.memory import keep_freed_memory
from trainer.process.parent import end_with_launcher, record_failure, with_trial_name


def print_topics(topics: list[str]) -> int:
    """Print the help on sections, keys or components of a config; returns the exit status."""
    # Imports what is asked about, such as torch's optimizers.
    from trainer.commands.component_help import topic_help

    end_on_closed_pipe()
    try:
        print("\n\n".join(map(topic_help, topics)))
    except ConfigError as error:
        return report_error(error)
    return 0


def _help_topics(arguments: list[str]) -> list[str]:
    """What stands after `--help`, such as `optimizer.adamw`."""
    topics: list[str] = []
    for word in arguments:
        if word in ("-h", "--help"):
            topics = []  # those after the last flag count
        elif "=" not in word and not word.endswith(".yaml"):
            topics.append(word)
    return topics


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit status. Errors are reported, and recorded in a W&B sweep."""
    quiet_torch()
    parser = CommandParser("train", __doc__)
    parser.add_config()
    if {"-h", "--help"} & set(arguments):
        if topics := _help_topics(arguments):
            return print_topics(topics)
        parser.epilog = f"keys of the config, with their types, defaults and meanings:\n{help_text()}"
        parser.print_help()
        return 0
    end_with_launcher()
    remember_argument_secrets(arguments)  # train.py comes here by itself
    try:
        return _train(parser, arguments)
    except KeyboardInterrupt:
        return report_interrupt(
            "interrupted; run.resume=auto goes on from the newest checkpoint"
        )


def _train(parser: CommandParser, arguments: list[str]) -> int:
    try:
        config = with_trial_name(load_config(parser.parse(arguments)))
        # Imports torch: a mistake in the config is reported before.
        from trainer.trainer import Trainer

        trainer = Trainer(config)
        keep_freed_memory(trainer.ranks.device.type)
        trainer.fit()
        trainer.ranks.close()
    except Exception as error:
        status = report_error(error)
        record_failure(error)
        return status
    return 0
