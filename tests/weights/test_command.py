from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medsa_nets.checksums import file_sha256
from medsa_nets.interaction.refinement import CropRefinement, VoxelRefinement
from medsa_nets.weights import BASES, describe_file
from medsa_nets.weights.__main__ import main


def test_file_is_described_by_the_bases_it_fits(tiny_base, tiny_file, publish):
    assert "it fits tiny (sha256" in describe_file(tiny_file)
    publish("tiny", sha256=file_sha256(tiny_file))
    assert "the published file of tiny" in describe_file(tiny_file)


def test_published_lite_medsam_is_recognised(lite_medsam_file):
    assert "the published file of lite_medsam" in describe_file(lite_medsam_file)


def test_file_of_any_input_size_is_recognised(tiny_base, make_sam, tmp_path):
    torch.save(make_sam(128).state_dict(), tmp_path / "small.pth")
    assert "it fits tiny" in describe_file(tmp_path / "small.pth")


@pytest.mark.parametrize("arguments", [[], ["list"]])
def test_command_list_shows_every_base(capsys, folder, publish, arguments):
    publish("vit_l", sha256=None)
    folder.mkdir()
    (folder / BASES["vit_l"].filename).write_bytes(b"weights")
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for base in BASES.values():
        assert base.name in shown
        assert base.url in shown
        assert base.licence in shown
    assert str(folder / BASES["vit_l"].filename) in shown
    assert "not on this machine" in shown


def test_command_check_accepts_a_base(capsys, tiny_base, tiny_file):
    assert main(["check", str(tiny_file)]) == 0
    assert str(tiny_file) in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, {"a": torch.zeros(1)}, 7])
def test_command_check_refuses_other_files_in_one_line(capsys, tmp_path, content):
    path = tmp_path / "given.pth"
    if content is not None:
        torch.save(content, path)
    assert main(["check", str(path)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"error: {path}: ")
    assert output.err.count("\n") == 1


@pytest.mark.parametrize("kind", [VoxelRefinement, CropRefinement])
@pytest.mark.parametrize("dims", [2, 3])
def test_command_check_says_what_clicks_mean_and_for_which_adapter(capsys, tmp_path, dims, kind):
    refinement, path = kind(dims, 9.0, width=16, asks=dims == 3, certainty=0.5), tmp_path / "organs.clicks.pt"
    refinement.save(path)
    weights = sum(parameter.numel() for parameter in refinement.parameters())
    assert main(["check", str(path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"{path}: a refinement of clicks on {'volumes' if dims == 3 else 'images'}, {weights:,} weights"
    assert shown[1] == f"  kind: {refinement.kind}"
    assert f"up to 9 {refinement.unit} from a click; sides from a logit of 0.5 on" in shown[2]
    assert ("answers of the network" in shown[3]) == refinement.asks
    assert shown[4] == "  goes with: the adapter organs.pt, which is not beside it"
    assert shown[5] == f"  sha256: {file_sha256(path)}"
    (tmp_path / "organs.pt").write_bytes(b"adapter")
    assert main(["check", str(path)]) == 0
    assert "  goes with: the adapter organs.pt beside it\n" in capsys.readouterr().out
    path.rename(tmp_path / "renamed.pt")
    assert main(["check", str(tmp_path / "renamed.pt")]) == 0
    shown = capsys.readouterr().out
    assert f"{weights:,} weights" in shown
    assert "no adapter by its name" in shown


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "missing", "other"])
def test_command_check_refuses_a_damaged_refinement_in_one_line(capsys, tmp_path, damage):
    path = tmp_path / "organs.clicks.pt"
    VoxelRefinement(2, 9.0, width=16).save(path)
    content = path.read_bytes()
    match damage:
        case "missing":
            path.unlink()
        case "other":
            torch.save({"a": torch.zeros(1)}, path)
        case "flipped":
            path.write_bytes(content[:40] + bytes(255 - b for b in content[40:240]) + content[240:])
        case _:
            path.write_bytes(b"" if damage == "empty" else content[: len(content) // 2])
    assert main(["check", str(path)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"error: {path}: ")
    assert output.err.count("\n") == 1


@pytest.mark.parametrize("bundle", ["medsa_btcv", "medsa_isic"])
def test_command_check_knows_the_refinements_of_the_bundles(capsys, bundle):
    models = Path(__file__).resolve().parents[2] / "bundles" / bundle / "models"
    found = sorted(models.glob("*.clicks.pt"))
    assert found
    for path in found:
        assert main(["check", str(path)]) == 0
        shown = capsys.readouterr().out
        assert f"refinement of clicks on {'volumes' if bundle == 'medsa_btcv' else 'images'}" in shown
        assert f"goes with: the adapter {path.name.removesuffix('.clicks.pt')}.pt beside it" in shown


def test_command_parameters_prints_the_table(capsys):
    assert main(["parameters", "--adapter_dim", "80"]) == 0
    shown = capsys.readouterr().out
    assert "| vit_h | 654.57 M | 13.48 M | 13.19 M | 2.06 % |" in shown
    assert shown.count("\n") == 2 + len(BASES)


def test_the_table_counts_the_depth_branch_of_volumes(capsys):
    trained = []
    for dims in ("2", "3"):
        assert main(["parameters", "--spatial_dims", dims, "--num_classes", "13"]) == 0
        row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| lite_medsam"))
        trained.append(float(row.split("|")[3].split()[0]))
    assert trained[1] > trained[0]


def test_command_fetch_reports_success_and_failure(capsys, server, publish, folder):
    served, address = server
    publish("vit_b", url=f"{address}/file.pth", sha256=None)
    assert main(["fetch", "vit_b"]) == 1
    assert "error: " in capsys.readouterr().err
    (served / "other.pth").write_bytes(b"weights")
    assert main(["fetch", "vit_b", "--url", f"{address}/other.pth"]) == 0
    assert str(folder / BASES["vit_b"].filename) in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["fetch", "vit_g"], ["check"], ["paint"]])
def test_command_line_mistakes_end_with_the_usage(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err
