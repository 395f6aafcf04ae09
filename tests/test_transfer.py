"""Heads, weights, frozen parts and rates of their own: against torchvision's models, files, and plain arithmetic."""

from __future__ import annotations

import http.server
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from tests.distributed.ranks import on_ranks
from trainer.components.freezing import Freezing
from trainer.components.heads import find_head, fit_head, head_outputs
from trainer.components.layers import layers_of
from trainer.components.models import build_model
from trainer.components.optimizer import build_optimizer
from trainer.components.weights import (
    download,
    load_weights,
    start_from_weights,
    weights_file,
)
from trainer.config.model_sections import BatchNormConfig, ModelConfig, OptimizerConfig
from trainer.errors import ConfigError, LockstepError
from trainer.process.ranks import Ranks

# Compute their widths with tensors, which the meta device cannot.
LARGE_TABLES = ("regnet",)


def net(classes: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)
        ),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(4, classes),
    )


def freeze(model: nn.Module, **section: Any) -> Freezing:
    freezing = Freezing(model, ModelConfig(**section))
    freezing.apply(0)
    model.train()
    return freezing


# ------------------------------------------------------------------------------------------------ heads


def test_every_torchvision_classifier_has_its_head_found() -> None:
    """Built with 7 outputs, the layer that is found has 7; a Linear one then takes 5. Without any weight drawn."""
    names = [
        n
        for n in models.list_models(module=models)
        if not n.startswith(LARGE_TABLES) or n.endswith("400mf")
    ]
    assert len(names) > 60
    for name in names:
        more = (
            {"aux_logits": False, "init_weights": False}
            if name in ("googlenet", "inception_v3")
            else {}
        )
        with torch.device("cpu" if name.startswith(LARGE_TABLES) else "meta"):
            model = models.get_model(name, num_classes=7, **more)
        head = find_head(model, None)
        assert head_outputs(model, head) == 7, name
        if isinstance(model.get_submodule(head), nn.Linear):
            assert fit_head(model, head, 5, seed=0)
            assert head_outputs(model, head) == 5, name
        else:
            assert name.startswith("squeezenet")


@pytest.mark.parametrize("name", ["googlenet", "squeezenet1_1", "mobilenet_v3_small"])
def test_a_model_by_name_has_the_classes_outputs(name: str) -> None:
    model = build_model(ModelConfig(name=name), seed=0, num_classes=5, in_channels=3)
    # In training too: one output.
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize(
    "name", ["fasterrcnn_mobilenet_v3_large_320_fpn", "lraspp_mobilenet_v3_large"]
)
def test_models_without_one_head_are_refused_by_name(name: str) -> None:
    # No backbone is fetched.
    model = build_model(ModelConfig(name=name), seed=0, num_classes=3, in_channels=3)
    with pytest.raises(ConfigError, match=r"model.name: \w+ (detects|segments)"):
        find_head(model, None)


def test_a_head_may_be_named() -> None:
    model = net()
    assert find_head(model, None) == "5"
    assert find_head(model, "0.0") == "0.0"
    with pytest.raises(ConfigError, match=r"model.head: the model has no module"):
        find_head(model, "5.fc")
    with pytest.raises(ConfigError, match="only a Linear can be replaced"):
        fit_head(model, "0.0", 9, seed=0)
    fit_head(model, "5", 9, seed=0)
    other = net()
    fit_head(other, "5", 9, seed=0)
    assert torch.equal(model[5].weight, other[5].weight)  # drawn by the seed
    other = net()
    fit_head(other, "5", 9, seed=1)
    assert not torch.equal(model[5].weight, other[5].weight)


# ------------------------------------------------------------------------------------------------ weights


def save(path: Path, tensors: dict[str, Tensor], wrapper: str = "") -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({wrapper: tensors, "epoch": 3} if wrapper else tensors, path)
    return path


@pytest.mark.parametrize(
    ("name", "wrapper"), [("a.safetensors", ""), ("a.pth", ""), ("a.pt", "state_dict")]
)
def test_a_file_is_loaded_but_for_the_head(
    tmp_path: Path, name: str, wrapper: str
) -> None:
    source = {
        k: torch.rand(v.shape).to(v.dtype) for k, v in net(1000).state_dict().items()
    }
    prefixed = {f"module.{k}": v for k, v in source.items()} if wrapper else source
    path = save(tmp_path / name, prefixed, wrapper)
    model = net(3)
    section = ModelConfig(weights=str(path))
    note = start_from_weights(
        weights_file(section, nullcontext), model, section, 3, seed=0
    )
    assert "12 of 14 tensors" in note
    assert "new: 5.bias, 5.weight" in note
    for k, v in model.state_dict().items():
        assert torch.equal(
            v, (net(3).state_dict() if k.startswith("5.") else source)[k]
        ), k


def test_a_model_of_fixed_outputs_gets_a_new_head(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pth", net(1000).state_dict())
    model = net(1000)
    section = ModelConfig(weights=str(path))
    assert "new head 5 with 3 outputs" in start_from_weights(
        path, model, section, 3, seed=0
    )
    assert model[5].out_features == 3


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    tensors = net().state_dict()
    tensors["extra.weight"] = torch.zeros(2)
    assert "1 not used: extra.weight" in load_weights(
        net(), save(tmp_path / "a.pth", tensors), "5"
    )
    del tensors["0.0.weight"]
    tensors["1.0.bias"] = torch.zeros(9)
    before = net()
    with pytest.raises(ConfigError) as caught:
        load_weights(before, save(tmp_path / "b.pth", tensors), "5")
    assert (
        "lacks 2 of the model's 14 tensors: 0.0.weight, 1.0.bias (another shape); it has 1"
        in str(caught.value)
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            before.state_dict().values(), net().state_dict().values(), strict=True
        )
    )


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("no tensors")
    torch.save(net(), tmp_path / "module.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "empty.pth").touch()
    cases = [
        ("missing.pth", "No such file"),
        ("empty.pth", "it ends too soon|cannot be read"),
        ("text.pth", "cannot be read|more than tensors"),
    ]
    for name, message in [
        *cases,
        ("module.pth", "more than tensors"),
        ("list.pth", "no state dict"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_weights(net(), tmp_path / name, "5")


def test_weights_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file is there, nothing is fetched; where it is not and cannot be, what to fetch and where to put it."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    section = ModelConfig(name="squeezenet1_1", weights="DEFAULT")
    url = models.SqueezeNet1_1_Weights.DEFAULT.url
    with pytest.raises(LockstepError) as caught:
        weights_file(section, nullcontext)
    assert caught.value.exit_status == 1  # the network may come back
    destination = tmp_path / "checkpoints" / url.rpartition("/")[2]
    assert f"download {url}" in str(caught.value)
    assert f"{destination} is missing" in str(caught.value)
    save(destination, models.squeezenet1_1(num_classes=1000).state_dict())
    path = weights_file(section, nullcontext)
    assert path == destination
    model = build_model(section, seed=0, num_classes=4, in_channels=3)
    assert "new: classifier.1.bias, classifier.1.weight" in start_from_weights(
        path, model, section, 4, seed=0
    )
    with pytest.raises(ConfigError, match=r'not "DEFUALT"; .* did you mean "DEFAULT"'):
        weights_file(ModelConfig(name="resnet18", weights="DEFUALT"), nullcontext)
    with pytest.raises(ConfigError, match="which small_cnn is not; give a file"):
        weights_file(ModelConfig(name="small_cnn", weights="DEFAULT"), nullcontext)


def test_one_process_of_a_machine_downloads(tmp_path: Path) -> None:
    requests: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"weights")

        def log_message(self, *_: Any) -> None:
            pass

    def fetch(port: int) -> bytes:
        ranks = Ranks("fp32")
        path = tmp_path / "deep" / "weights.pth"
        download(f"http://127.0.0.1:{port}/weights.pth", path, ranks.main_first)
        return path.read_bytes()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert on_ranks(3, fetch, server.server_port) == [b"weights"] * 3
        server.shutdown()
    assert requests == ["/weights.pth"]


# ------------------------------------------------------------------------------------------------ freezing


def test_a_frozen_backbone_stands_still_and_builds_no_graph() -> None:
    model = net()
    freeze(model, freeze="backbone")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "5.weight",
        "5.bias",
    ]
    images = torch.rand(4, 3, 6, 6)
    with torch.no_grad():
        expected = net().eval()[:5](images)
    features = model[:4](images)
    assert torch.equal(features, expected)  # by the statistics, without dropout
    assert features.grad_fn is None
    assert model[4].training  # the dropout beside the head is the head's
    optimizer = build_optimizer(OptimizerConfig(lr=0.1), model)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
    model(images).sum().backward()
    optimizer.step()
    changed = {
        k for k, v in model.state_dict().items() if not torch.equal(v, before[k])
    }
    assert changed == {"5.weight", "5.bias"}


def test_parts_by_name_and_what_they_hold() -> None:
    model = models.resnet18(num_classes=3)
    freeze(model, freeze=["conv1", "bn1", "layer[12]*"])
    trained = {
        name.partition(".")[0]
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    assert trained == {"layer3", "layer4", "fc"}
    in_eval = {
        name.partition(".")[0]
        for name, m in model.named_modules()
        if name and not m.training
    }
    assert in_eval == {"conv1", "bn1", "layer1", "layer2"}


def test_vision_transformers_tokens_are_of_the_backbone() -> None:
    model = models.VisionTransformer(32, 16, 2, 2, 8, 8, num_classes=3)
    freeze(model, freeze="backbone")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "heads.head.weight",
        "heads.head.bias",
    }
    assert model(torch.rand(2, 3, 32, 32)).requires_grad


def test_thawing_is_a_function_of_the_epoch() -> None:
    model = net()
    freezing = freeze(model, freeze="backbone", unfreeze={"2": ["1"], "10": "backbone"})
    assert (
        sum(
            len(g["params"])
            for g in build_optimizer(OptimizerConfig(), model).param_groups
        )
        == 2
    )
    model = net()
    freezing = Freezing(
        model, ModelConfig(freeze="backbone", unfreeze={"2": ["1"], "10": "backbone"})
    )
    optimizer = build_optimizer(OptimizerConfig(), model)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(
        list(model.parameters())
    )

    def trained_and_training(epoch: int) -> tuple[set[str], list[bool]]:
        freezing.apply(epoch)
        model.train()
        return {n for n, p in model.named_parameters() if p.requires_grad}, [
            m.training for m in model
        ]

    everything = {name for name, _ in model.named_parameters()}
    for epoch, trained, training in [
        (0, {"5.weight", "5.bias"}, [False, False, True, True, True, True]),
        (1, {"5.weight", "5.bias"}, [False, False, True, True, True, True]),
        (
            2,
            {"5.weight", "5.bias", "1.0.weight", "1.0.bias"},
            [False, True, True, True, True, True],
        ),
        (10, everything, [True] * 6),
        (0, {"5.weight", "5.bias"}, [False, False, True, True, True, True]),
    ]:
        assert trained_and_training(epoch) == (trained, training), epoch
    assert freezing.head is model[5]
    freezing.apply(2)
    assert freezing.head is None


def test_thawed_parts_keep_a_batch_norm_that_is_frozen_for_another_reason() -> None:
    from trainer.exact.batch_norm import configure

    model = configure(
        net(), BatchNormConfig(mode="frozen"), ranks=1, device=torch.device("cpu")
    )
    freezing = freeze(model, freeze="backbone", unfreeze={"1": "backbone"})
    freezing.apply(1)
    model.train()
    assert [m.training for m in model[0]] == [True, False, True, True]
    assert not model[0][1].weight.requires_grad


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"freeze": "backbnoe"},
            'model.freeze: "backbnoe" is neither backbone nor a list',
        ),
        (
            {"freeze": ["layer9"]},
            'model.freeze: no part of the model is named "layer9"',
        ),
        ({"unfreeze": {"2": ["1"]}}, "model.unfreeze: nothing is frozen"),
        ({"freeze": ["1"], "unfreeze": {"2": ["0"]}}, "is not frozen by then"),
        ({"freeze": ["1"], "unfreeze": {"soon": ["1"]}}, "is not a number of epochs"),
        ({"freeze": ["1"], "unfreeze": {"2": "1"}}, "neither backbone nor a list"),
    ],
)
def test_mistakes_in_freezing(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Freezing(net(), ModelConfig(**section))
    assert message in str(caught.value)


# ------------------------------------------------------------------------------------------------ learning rates


def test_layers_are_blocks_in_order() -> None:
    def first_of_each(model: nn.Module) -> dict[str, int]:
        layers = layers_of(model, find_head(model, None))
        return {name: layers[name] for name, _ in model.named_parameters()}

    resnet = first_of_each(models.resnet18())
    for name, layer in {
        "conv1.weight": 0,
        "bn1.bias": 0,
        "layer1.0.conv2.weight": 1,
        "layer1.1.bn1.weight": 2,
    }.items():
        assert resnet[name] == layer, name
    assert resnet["layer4.1.conv1.weight"] == 8
    assert resnet["fc.weight"] == resnet["fc.bias"] == 9
    vit = first_of_each(models.VisionTransformer(32, 16, 3, 2, 8, 8))
    firsts = ("class_token", "conv_proj.weight", "encoder.pos_embedding")
    assert {vit[name] for name in firsts} == {0}
    assert vit["encoder.layers.encoder_layer_0.mlp.0.weight"] == 1
    assert (
        vit["encoder.layers.encoder_layer_2.ln_1.weight"]
        == vit["encoder.ln.weight"]
        == 3
    )
    assert vit["heads.head.weight"] == 4


@pytest.mark.parametrize("spared", [False, True])
def test_rates_of_head_backbone_and_layers(spared: bool) -> None:
    model = net()
    section = OptimizerConfig(
        lr=1.0,
        backbone_lr=0.5,
        layer_decay=0.1,
        decay_norm_and_bias=not spared,
        args={"weight_decay": 0.3},
    )
    optimizer = build_optimizer(section, model)
    assert optimizer.param_groups[0]["lr"] == 1.0  # what is logged as the learning rate
    groups = {
        id(p): (g["lr"], g["initial_lr"], g["weight_decay"])
        for g in optimizer.param_groups
        for p in g["params"]
    }
    # Members of the nested Sequentials: convolution 0 with its norm, convolution 1, head.
    expected = {"0.0": 0.005, "0.1": 0.005, "1.0": 0.05, "5": 1.0}
    for name, parameter in model.named_parameters():
        rate, initial, decay = groups[id(parameter)]
        assert rate == initial == pytest.approx(expected[name.rpartition(".")[0]]), name
        assert decay == (0.0 if spared and parameter.ndim == 1 else 0.3)
    assert len(groups) == len(list(model.parameters()))
