"""Settings: layers, names, errors."""

import pytest

from fcunet.config import SECTION_OF, SECTIONS, Config, parse_region, parse_vectors


def test_load__argument_beats_environment_beats_file(tmp_path, monkeypatch):
    file = tmp_path / "run.yaml"
    file.write_text("detection:\n  corr_power: 0.5\n  sigma_cc: 3\n  sigma_dp: 1\n")
    monkeypatch.setenv("FCUNET_DETECTION__SIGMA_CC", "4")
    monkeypatch.setenv("FCUNET_DETECTION__CORR_POWER", "0.6")
    config = Config.load(file, corr_power=0.7)
    assert (config.detection.corr_power, config.detection.sigma_cc, config.detection.sigma_dp) == (0.7, 4, 1)


def test_to_yaml__reads_back_as_the_same_settings(tmp_path):
    config = Config.load(
        store="scan.zarr", region="0:4,2:8", reference="0:4,0:2", basis="30,1,-1,50", workers=3
    )
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert Config.load(file) == config


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [("detection:\n  corr_pwer: 1\n", "detection.corr_power"), ("detecton: {}\n", "detection")],
)
def test_unknown_key__is_refused_with_the_nearest_known_one(tmp_path, text, suggestion):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=suggestion):
        Config.load(file)


def test_missing_file__is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        Config.load(tmp_path / "nowhere.yaml")


def test_setting_names__are_unique_across_sections():
    names = [n for model in SECTIONS.values() for n in model.model_fields if n not in SECTIONS]
    assert len(names) == len(set(names)) == len(SECTION_OF)


def test_science_hash__ignores_where_and_how_fast():
    one = Config.load(device="cpu", batch=1, workers=1, out="a", weighting="uniform")
    two = Config.load(device="cuda", batch=64, workers=8, out="b", weighting="sigma")
    assert one.science_hash() == two.science_hash()


def test_science_hash__changes_with_a_detection_setting():
    assert Config.load(sigma_cc=1.0).science_hash() != Config.load(sigma_cc=2.0).science_hash()


def test_parse_region__gives_rows_then_columns():
    assert parse_region("1:5,2:9") == (1, 5, 2, 9)


@pytest.mark.parametrize("text", ["", "1:5", "1,5:2,9", "5:1,0:4", "-1:4,0:4", "a:b,c:d"])
def test_parse_region__refuses(text):
    with pytest.raises(ValueError, match="Y0:Y1,X0:X1"):
        parse_region(text)


def test_parse_vectors__is_row_then_column():
    assert parse_vectors("30,1,-1,50") == ((30, 1), (-1, 50))


def test_science_hash__changes_with_a_given_radius():
    assert Config.load(probe_radius_px=5.0).science_hash() != Config.load().science_hash()


def test_centre__is_row_then_column():
    assert Config.load(centre="130.2,138.3").calibration.centre == (130.2, 138.3)


def test_several_known_crystals__are_eight_or_twelve_numbers():
    one, two = ((1.0, 30.0), (25.0, -3.0)), ((0.0, 26.0), (26.0, 0.0))
    assert Config.load(basis="1,30,25,-3").lattice.basis == one
    assert Config.load(basis="1,30,25,-3,0,26,26,0", max_lattices=2).lattice.basis == (one, two)
    again = Config.load(basis=[one, two])
    assert again.lattice.basis == (one, two)
    with pytest.raises(ValueError, match="a pair of vectors"):
        Config.load(basis="1,2,3")


def test_indices_and_axes__are_whole_numbers():
    strain = Config.load(crystal="F 5.4309", zone="1,1,0", miller="1,-1,1,-1,1,1", axis="0,0,1").strain
    assert (strain.zone, strain.miller, strain.axis) == ((1, 1, 0), ((1, -1, 1), (-1, 1, 1)), (0, 0, 1))
    assert Config.load(axis="g2").strain.axis == "g2"
    assert Config.load(axis="1,1").strain.axis == (1, 1)
    with pytest.raises(ValueError, match="3 whole numbers"):
        Config.load(zone="1,1")
