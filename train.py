"""Train what a config describes. `lockstep train` and `python -m trainer train` are the same command.

python train.py                                                 configs/digits.yaml, on one GPU or the CPU
python train.py configs/cifar10.yaml batch.size=256             another config, one key changed
accelerate launch --config_file launch/cpu.yaml train.py        the same run on two CPU processes
torchrun --nproc_per_node 8 train.py                            the same run on eight GPUs
"""

import sys

from trainer.commands.train import main
from trainer.process.command import begin_command
from trainer.process.exit import exit_process

if __name__ == "__main__":
    begin_command()
    exit_process(main(sys.argv[1:]))
