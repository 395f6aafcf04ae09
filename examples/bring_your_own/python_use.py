"""The same project without YAML: python -m examples.bring_your_own.python_use (about 10 seconds; val/iou above 0.7)."""

from examples.bring_your_own.data import Discs
from examples.bring_your_own.model import dilated_net
from examples.bring_your_own.task import Segmentation
from trainer import Config, Trainer

if __name__ == "__main__":
    config = Config.from_dict({"train": {"epochs": 3}, "best": {"metric": "val/iou", "mode": "max"}})
    model, train, val = dilated_net(in_channels=1), Discs(train=True), Discs(train=False)
    summary = Trainer(config, model=model, train_data=train, val_data=val, task=Segmentation()).fit()
    print(f"val/iou {summary['best']:.3f}")
