"""The same project without YAML: python -m examples.bring_your_own.python_use (about 10 seconds; val/iou above 0.7)."""

from examples.bring_your_own.data import Discs
from examples.bring_your_own.model import dilated_net
from examples.bring_your_own.task import Segmentation
from trainer import Config, Trainer

if __name__ == "__main__":
    settings = {"train": {"epochs": 3}, "best": {"metric": "val/iou", "mode": "max"}}
    data = {"train_data": Discs(train=True), "val_data": Discs(train=False)}
    objects = {"model": dilated_net(in_channels=1), "task": Segmentation(), **data}
    summary = Trainer(Config.from_dict(settings), **objects).fit()
    print(f"val/iou {summary['best']:.3f}")
