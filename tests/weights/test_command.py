from __future__ import annotations

import pytest
import torch

from medsa_nets.checksums import file_sha256
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
