"""Train what a config describes.

python train.py                                     configs/digits.yaml, on one GPU or the CPU
python train.py configs/cifar10.yaml batch.size=256 another config, a key changed
accelerate launch --config_file launch/cpu.yaml train.py        the same run on two CPU processes
torchrun --nproc_per_node 8 train.py                the same run on eight GPUs
"""

import signal
import sys

from trainer.config.load import command_line, help_text, load
from trainer.errors import leave, report
from trainer.process.parent import end_with_launcher, record_failure, with_trial_name


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` is no error
        print(f"usage: train.py [CONFIG.yaml] [key=value …]\n\n{__doc__}{help_text()}")
        return 0
    end_with_launcher()
    try:
        config = with_trial_name(load(*command_line(arguments)))
        from trainer.trainer import Trainer  # torch is loaded once the config is known to be right

        trainer = Trainer(config)
        trainer.fit()
        trainer.ranks.close()
    except Exception as error:
        status = report(error)
        record_failure(error)
        return status
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
