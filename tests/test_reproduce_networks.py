"""Figures 2 and 7 to 12: the paper's networks and settings, what is written, how a training run resumes."""

from __future__ import annotations

import itertools
import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from fastagop import collapse
from reproduce import figures, layers, network_plots, network_settings, networks, nfa_table, runs, training
from reproduce.__main__ import FIGURES, main, parser
from reproduce.settings import RunLocation
from tests.test_reproduce import check_image, read

SMALL = ["--dataset", "digits", "--n", "100", "--width", "16", "--epochs", "4", "--every", "2", "--init-scale", "1"]


@pytest.fixture(scope="module")
def figure7(tmp_path_factory):
    """The folder of an uninterrupted figure 7 of digits, two seeds."""
    out = tmp_path_factory.mktemp("figure7")
    assert main(["figure7", *SMALL, "--seeds", "0", "1", "--momentum", "0.9", "--out", str(out)]) == 0
    return out


# ---- Networks and settings


def settings_of(name: str, *options: str) -> list[network_settings.NetworkSettings]:
    args = parser().parse_args([name, *options])
    rows = figures.rows_of(FIGURES[name].rows, args.dataset)
    return [settings for row in rows for settings in figures.settings_of(FIGURES[name].family, row, args)]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("figure2", [("mnist", "mlp"), ("cifar10", "resnet")]),
        *[(f"figure{i}", [(data, "mlp") for data in ("mnist", "cifar10", "svhn")]) for i in (7, 10)],
        *[(f"figure{i}", [(data, "resnet") for data in ("mnist", "cifar10", "svhn")]) for i in (8, 11)],
        *[(f"figure{i}", [(data, "vgg") for data in ("mnist", "cifar10", "svhn")]) for i in (9, 12)],
    ],
)
def test_defaults_are_the_papers(name, rows):
    found = settings_of(name)
    assert [(s.dataset, s.network) for s in found[::3]] == rows
    assert [s.seed for s in found] == len(rows) * [0, 1, 2]
    training_of = {"mlp": (500, 0.05, 0.0), "resnet": (300, 0.05, 0.0), "vgg": (600, 0.01, 0.9)}
    for s in found:
        assert (s.epochs, s.learning_rate, s.momentum) == training_of[s.network]
        assert s.init_scale == (0.2 if s.network == "resnet" or s.dataset == "mnist" else 0.3)
        assert (s.n, s.width, s.batch, s.every) == (50_000, 512, 128, 10)


def test_quick_is_small_and_can_be_changed():
    (one,) = settings_of("figure7", "--quick", "--dataset", "mnist")
    assert (one.n, one.seed, one.width) == (1000, 0, 512)
    assert one.epochs <= 100
    (one,) = settings_of("figure7", "--quick", "--dataset", "mnist", "--n", "200", "--seeds", "3", "--momentum", "0")
    assert (one.n, one.seed, one.momentum) == (200, 3, 0.0)


@pytest.mark.parametrize(
    ("network", "dataset", "d", "features"),
    [
        ("mlp", "mnist", 784, 784),
        ("resnet", "mnist", 784, 512),
        ("vgg", "mnist", 784, 512),  # 28 x 28 leaves one pixel before the last two poolings
        ("vgg", "cifar10", 3072, 2048),
    ],
)
def test_networks_have_the_papers_shapes(network, dataset, d, features):
    settings = network_settings.paper(dataset, network, n=100)
    model = networks.build(settings, d, 10)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(features, 512), *4 * [(512, 512)], (512, 10)]
    assert all(m.bias is None for m in linear)
    for m in linear[:-1]:
        assert float(m.weight.detach().std()) == pytest.approx(
            settings.init_scale * (2 / m.in_features) ** 0.5, rel=0.02
        )
    assert float(linear[-1].weight.detach().abs().max()) <= 512**-0.5  # torch's own: uniform
    if network == "vgg":
        convolutions = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert convolutions == [64, 128, 256, 256, 512, 512, 512, 512]
        assert sum(isinstance(m, nn.MaxPool2d) for m in model.modules()) == 4
    if network == "resnet":
        assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 20


def test_images_come_back_as_they_were():
    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(networks.Images(48, channels_first=True)(images.flatten(1)), images)
    assert torch.equal(networks.Images(48, channels_first=False)(images.permute(0, 2, 3, 1).flatten(1)), images)
    grey = networks.Images(16, channels_first=False)(images[:, 0].flatten(1))
    assert torch.equal(grey, images[:, :1].expand(-1, 3, -1, -1))
    with pytest.raises(ValueError, match="no square images"):
        networks.Images(50, channels_first=False)


# ---- Results


def test_figure_writes_everything(figure7):
    check_image(figure7 / "figure7.png")
    assert (figure7 / "figure7.pdf").read_bytes().startswith(b"%PDF")
    rows = read(figure7 / "figure7.csv")
    stages = [f"{measure}_{stage}" for measure in ("nc1", "nc2") for stage in layers.STAGES]
    assert list(rows[0]) == ["dataset", "network", "seed", "epoch", "layer", "loss", "nfa", *stages]
    expected = [(s, e, n) for s in "01" for e in ("0", "2", "4") for n in "123456"]
    assert [(row["seed"], row["epoch"], row["layer"]) for row in rows] == expected
    assert all(-1 <= float(row["nfa"]) <= 1 for row in rows)
    last = [row for row in rows if row["epoch"] == "4"]
    for row, following in itertools.pairwise(last):
        if row["layer"] != "6":  # what leaves a layer enters the next
            assert float(row["nc1_features"]) == pytest.approx(float(following["nc1_input"]), rel=1e-3)
    about = json.loads((figure7 / "figure7.json").read_text())
    assert [run["settings"]["seed"] for run in about["runs"]] == [0, 1]


def test_training_lowers_the_loss_and_nc1(figure7):
    folder = next((figure7 / "runs").iterdir())
    assert {path.name for path in folder.iterdir()} == {"settings.json", "measures.csv", "record.json"}
    record = json.loads((folder / "record.json").read_text())
    assert len(record["losses"]) == 4
    assert record["losses"][-1] < record["losses"][0]
    readout = [row["nc1_features"] for row in record["layers"] if row["layer"] == 6]
    assert readout[-1] < readout[0]


@pytest.mark.parametrize("name", ["figure7", "figure10"])
def test_runs_are_shared(figure7, name, monkeypatch, capsys):
    monkeypatch.setattr(training.NetworkProcedure, "compute", None)
    assert main([name, *SMALL, "--seeds", "0", "1", "--momentum", "0.9", "--out", str(figure7)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("complete, nothing to compute") == 2
    assert "NFA correlation over hidden layers and seeds" in printed
    assert (figure7 / f"{name}.csv").read_bytes() == (figure7 / "figure7.csv").read_bytes()
    check_image(figure7 / f"{name}.png")


def test_an_interrupted_run_resumes_with_the_same_numbers(figure7, tmp_path, monkeypatch, capsys):
    command = ["figure7", *SMALL, "--seeds", "0", "1", "--momentum", "0.9", "--out", str(tmp_path)]
    epoch = training.Training.train_epoch

    def killed(self):
        if self.epoch == 3:
            raise KeyboardInterrupt
        return epoch(self)

    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "train_epoch", killed)
        assert main(command) == 130
    assert "resumes" in capsys.readouterr().err
    assert main(command) == 0
    assert "resumed after epoch 2" in capsys.readouterr().out
    assert (tmp_path / "figure7.csv").read_bytes() == (figure7 / "figure7.csv").read_bytes()


def step_by_hand(one: training.Training) -> float:
    """One step of heavy-ball SGD on all points at once, and the loss it starts from."""
    one.model.train()
    loss = (one.model(one.X) - one.Y).square().mean()
    parameters = list(one.model.parameters())
    grads = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.sub_(one.settings.learning_rate * grad)  # the first step has no momentum yet
    return float(loss)


@torch.no_grad()
def accuracy_by_hand(one: training.Training) -> float:
    return float((one.model.eval()(one.X).argmax(1) == one.labels).double().mean())


def network_measures(one: training.Training) -> list[tuple[float, float, float]]:
    """(NC1, NC2, NFA correlation) of the input of every Linear layer, in evaluation mode and from hooks of its own."""
    model, inputs = one.model.eval(), {}
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [m.register_forward_hook(lambda m, args, _: inputs.update({m: args[0].detach()})) for m in linear]
    with torch.no_grad():
        model(one.X)
    for handle in handles:
        handle.remove()
    found = []
    for i, layer in enumerate(linear):
        rest = nn.Sequential(*[part for m in linear[i:] for part in (m, nn.ReLU())][:-1])
        x = inputs[layer].requires_grad_()
        outputs = rest(x).sum(0)
        G = torch.cat([torch.autograd.grad(out, x, retain_graph=True)[0] for out in outputs]).double()
        values, vectors = torch.linalg.eigh(G.T @ G)
        root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        W = layer.weight.detach().double()
        nfa = np.corrcoef((W.T @ W).flatten().numpy(), root.flatten().numpy())[0, 1]
        x = x.detach()
        found.append((collapse.nc1(x, one.labels), collapse.nc2(x, one.labels), nfa))
    return found


@pytest.mark.parametrize(("network", "dataset"), [("resnet", "digits"), ("vgg", "sixteen")])
@pytest.mark.filterwarnings("error:network measures leave out")  # The trunk is not what the figures are about.
def test_convolutional_networks_train_and_measure(tmp_path, network, dataset):
    if dataset == "sixteen":  # VGG's poolings want images of 16 x 16
        X = np.random.default_rng(0).random((40, 16, 16, 3), np.float32)
        dataset = str(tmp_path / "sixteen.npz")
        np.savez(dataset, x_train=X, y_train=np.arange(40) % 4, x_test=X, y_test=np.arange(40) % 4)
    settings = network_settings.paper(dataset, network, n=40, epochs=1, width=16, init_scale=1.0)
    run = runs.run(training.NetworkProcedure(), settings, RunLocation(tmp_path))
    assert [(row["epoch"], row["layer"]) for row in run.rows] == [(epoch, i) for epoch in (0, 1) for i in range(1, 7)]
    one = training.Training(settings, RunLocation(tmp_path))
    before, after = network_measures(one), step_by_hand(one)
    assert run.record["losses"] == [pytest.approx(after, rel=1e-5)]
    for rows, expected in ((run.rows[:6], before), (run.rows[6:], network_measures(one))):
        for row, (nc1, nc2, nfa) in zip(rows, expected, strict=True):
            found = [row["nc1_input"], row["nc2_input"], row["nfa"]]
            assert found == [pytest.approx(value, rel=1e-2, abs=1e-3) for value in (nc1, nc2, nfa)]
    assert run.record["accuracy"] == pytest.approx(accuracy_by_hand(one), abs=1 / 40 + 1e-9)


def test_the_band_is_truncated():
    mean, low, high = network_plots.band(np.array([[1.0, 0.0], [1.0, 2.0], [1.0, 10.0]]))
    np.testing.assert_allclose(mean, [1, 4])
    np.testing.assert_allclose(low, [1, 0.04])  # 4 minus a deviation of 4.3 is below 0
    np.testing.assert_allclose(high, [1, 4 + np.std([0, 2, 10])])


def test_the_share_of_the_drop_on_a_log_scale():
    assert training.log_drop_share(100.0, 1.0, 0.1) == pytest.approx(2 / 3)
    assert training.log_drop_share(10.0, 0.1, 1.0) == pytest.approx(2)  # the nonlinearity takes some back
    assert training.log_drop_share(1.0, 0.5, 2.0) is None
    assert training.log_drop_share(float("inf"), 1.0, 0.5) is None


def test_gaps_are_drawn_as_gaps(tmp_path):
    nc1 = {stage: np.array([[[1.0, np.inf], [np.nan, 0.0]]]) for stage in layers.STAGES}
    history = network_plots.TrainingHistory("a", np.array([0, 10]), nc1, np.full((1, 2, 2), np.nan), np.ones((1, 10)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for draw in (network_plots.splits, network_plots.progress):
            draw([history], "gaps").savefig(tmp_path / "gaps.png")


# ---- What cannot run


@pytest.mark.parametrize(
    ("options", "excerpt"),
    [
        (["--dataset", "digits", "--n", "5000"], "--n must be from 1 to 1437"),
        (["--dataset", "imagenet"], "'imagenet'"),
        ([*SMALL, "--learning-rate", "1e4"], "choose a smaller --learning-rate"),
    ],
)
def test_bad_settings_are_one_line(tmp_path, capsys, options, excerpt):
    assert main(["figure7", *options, "--seeds", "0", "--out", str(tmp_path)]) == 2
    (printed,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("python -m reproduce")]
    assert excerpt in printed


def test_vgg_refuses_small_images(tmp_path, capsys):
    assert main(["figure9", *SMALL, "--out", str(tmp_path)]) == 2
    assert "VGG-11 needs images of at least 16 x 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changed", [["--epochs", "0"], ["--learning-rate", "0"], ["--init-scale", "x"], ["--every", "0"]]
)
def test_bad_options_exit_2(capsys, changed):
    with pytest.raises(SystemExit) as stopped:
        main(["figure7", *changed])
    assert stopped.value.code == 2
    assert changed[0] in capsys.readouterr().err


# ---- A model of one's own


def custom_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Unflatten(1, (8, 8)), nn.Linear(8, 6), nn.Tanh(), nn.Flatten(), nn.Linear(48, 10))


def test_nfa_table_of_a_model_with_tokens(capsys, monkeypatch):
    monkeypatch.setitem(
        __import__("sys").modules, "mine", type("mine", (), {"build": staticmethod(custom_model), "no": 3})
    )
    assert main(["nfa_table", "--model", "mine:build", "--n", "50"]) == 0
    head, tokens, matrix = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "layer"
    assert (tokens.split()[0], matrix.split()[0]) == ("1", "4")
    assert tokens.count("e+") + tokens.count("e-") == 0  # tokens have no NC1, but an NFA correlation
    assert matrix.count("e+") + matrix.count("e-") == 3
    assert -1 <= float(tokens.split("|")[-1]) <= 1
    assert main(["nfa_table", "--model", "mine:no", "--n", "50"]) == 2
    assert main(["nfa_table", "--model", "mine:nothing", "--n", "50"]) == 2
    capsys.readouterr()
    for model in ("nowhere_at_all:f", "torch.nn:Linear", ":f"):
        assert main(["nfa_table", "--model", model, "--n", "50"]) == 2
        assert f"--model '{model}' cannot be imported and called without" in capsys.readouterr().err


def test_nfa_table_takes_the_activation(capsys, monkeypatch):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

    monkeypatch.setitem(__import__("sys").modules, "mine", type("mine", (), {"build": staticmethod(build)}))
    rows = {}
    for activation in ("relu", "tanh"):
        assert main(["nfa_table", "--model", "mine:build", "--n", "50", "--activation", activation]) == 0
        rows[activation] = [line.split("|")[1].split() for line in capsys.readouterr().out.splitlines()[1:]]
    first, second = rows["tanh"]
    assert first[2] == second[0]  # what follows the first layer is what enters the second
    assert rows["relu"][0][2] != first[2]
    assert main(["nfa_table", "--model", "mine:build", "--n", "50", "--shape", "8", "8"]) == 2
    assert "--shape says what it wants" in capsys.readouterr().err


def test_nfa_table_takes_a_loader():
    X, y = torch.randn(30, 64), torch.arange(30) % 3
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), batch_size=7)
    assert nfa_table.table(custom_model(), loader) == nfa_table.table(custom_model(), X, y)


class Mixed(nn.Module):
    """A convolution, attention, a table of places and a readout; one convolution is dead."""

    def __init__(self):
        super().__init__()
        self.conv, self.dead, self.places = nn.Conv1d(1, 4, 3), nn.Conv1d(1, 2, 3), nn.Embedding(6, 4)
        self.attention, self.out = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(24, 3)

    def forward(self, x):
        h = self.conv(x[:, None]).mT + self.places.weight + 0 * self.dead(x[:, None]).sum((1, 2))[:, None, None]
        return self.out(torch.tanh(self.attention(h, h, h)[0]).flatten(1))


@pytest.mark.parametrize("layers", [None, ["conv", "dead", "att*", "out"]])
@pytest.mark.filterwarnings("ignore:network measures leave out")
def test_nfa_table_of_convolutions_and_attention(layers):
    X, y = torch.randn(12, 8), torch.arange(12) % 3
    head, *rows = nfa_table.table(Mixed(), X, y, layers, loss=nfa_table.LOSSES["cross_entropy"]).splitlines()
    assert head.split("|")[-2:] == ["    NFA ", "   FACT"]
    cells = {row.split()[0]: [cell.strip() for cell in row.split("|")[1:]] for row in rows}
    projections = [f"attention.{part}_proj" for part in ("q", "k", "v", "out")]
    assert [name for name in cells if name != "dead"] == ["conv", *projections, "out"]
    for name, (nc1, nc2, nfa, fact) in cells.items():
        if name != "dead":
            assert (bool(nc1), bool(nc2)) == (name == "out", name == "out")
            assert -1 <= float(nfa) <= 1
            assert -1 <= float(fact) <= 1
    assert ("dead" in cells) == (layers is not None)  # named, it has a line of empty cells
    assert cells.get("dead", ["", "", "", ""]) == ["", "", "", ""]
