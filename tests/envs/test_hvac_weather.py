"""Weather: shipped stations, a user's EPW file, and files that are broken in every way we know."""

from pathlib import Path

import numpy as np
import pytest

from sapwood.envs.hvac import CLIMATES, load_weather, read_epw
from sapwood.envs.hvac.weather import DAYS_IN_MONTH, WITHOUT_STATION, Weather, lagged_ground_temperature
from sapwood.errors import ConfigError, DataError

HEADER = ["LOCATION,Somewhere,XX,ZZ,TMY3,000000,10.0,20.0,1.0,5.0", *["HEADER"] * 7]


def epw_rows() -> list[str]:
    """A year in which hour k of the year has k / 1000 degC and k % 24 Wh/m2."""
    rows = []
    for month, days in enumerate(DAYS_IN_MONTH, start=1):
        for day in range(1, days + 1):
            for hour in range(24):
                k = len(rows)
                fields = ["1999", month, day, hour + 1, 0, "?", k / 1000, *[0] * 6, k % 24, *[0] * 21]
                rows.append(",".join(str(field) for field in fields))
    return rows


def write(path: Path, rows: list[str], header: list[str] = HEADER) -> Path:
    path.write_text("\n".join([*header, *rows]) + "\n", encoding="latin-1")
    return path


def test_epw_is_read_hour_by_hour(tmp_path):
    weather = read_epw(write(tmp_path / "good.epw", epw_rows()))
    assert weather.name == "Somewhere,XX,ZZ"
    assert weather.outdoor == pytest.approx(np.arange(8760) / 1000)
    assert weather.ghi[:26].tolist() == [*range(24), 0, 1]


def test_hours_with_leading_zeros_are_read(tmp_path):
    rows = [
        f"1999,{int(m):02d},{int(d):02d},{int(h):02d},{rest}"
        for _, m, d, h, rest in (r.split(",", 4) for r in epw_rows())
    ]
    assert read_epw(write(tmp_path / "zeros.epw", rows)).outdoor == pytest.approx(np.arange(8760) / 1000)


def test_29_february_is_left_out(tmp_path):
    rows = epw_rows()
    start = (31 + 28) * 24
    leap = [rows[start - 24 + h].replace(",2,28,", ",2,29,", 1).replace(",1.", ",55.") for h in range(24)]
    weather = read_epw(write(tmp_path / "leap.epw", [*rows[:start], *leap, *rows[start:]]))
    assert len(weather.outdoor) == 8760
    assert weather.outdoor.max() < 10


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda rows: rows[:5000], r"bad\.epw, line 5008: 5000 hourly rows, a year has 8760"),
        (lambda rows: [rows[0].rsplit(",", 30)[0], *rows[1:]], r"bad\.epw, line 9: 5 fields"),
        (lambda rows: [rows[0], rows[1].replace("0.001", "warm"), *rows[2:]], "line 10, field 7.*'warm'"),
        (lambda rows: [rows[0], rows[1].replace("0.001", "nan"), *rows[2:]], "line 10, field 7.*nan"),
        (lambda rows: [rows[0], rows[1].replace("0.001", "99.9"), *rows[2:]], "line 10, field 7.*outside"),
        (lambda rows: [*rows, rows[0]], "8761 hourly rows"),
        # 3 January, 1 to 4 o'clock lost; an hour lost and another doubled, which leaves the count right
        (lambda rows: rows[:48] + rows[52:], "line 57: month/day/hour 1/3/5 where 1/3/1 should be: hours are missing"),
        (lambda rows: [*rows[:48], rows[47], *rows[49:]], "line 57: month/day/hour 1/2/24 where 1/3/1 should be"),
        (lambda rows: [rows[0].replace("1999,1,1,1,", "1999,1,one,1,"), *rows[1:]], "line 9: month/day/hour 1/one/1"),
    ],
)
def test_broken_epw_names_file_and_line(tmp_path, damage, message):
    path = write(tmp_path / "bad.epw", damage(epw_rows()))
    with pytest.raises(DataError, match=message):
        read_epw(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"missing\.epw: can't be read"):
        read_epw(tmp_path / "missing.epw")
    (tmp_path / "empty.epw").write_bytes(b"")
    with pytest.raises(DataError, match="line 1"):
        read_epw(tmp_path / "empty.epw")
    (tmp_path / "binary.epw").write_bytes(bytes(range(256)) * 50)
    with pytest.raises(DataError, match="line 1"):
        read_epw(tmp_path / "binary.epw")
    with pytest.raises(DataError, match="can't be read"):
        read_epw(tmp_path)


def test_ground_is_the_outdoor_mean_of_three_months_before():
    outdoor = np.repeat(np.arange(12.0), np.array(DAYS_IN_MONTH) * 24)  # month number as temperature
    assert lagged_ground_temperature(outdoor).tolist() == [9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_denver_ground_is_that_of_the_prototype_models():
    # Site:GroundTemperature:FCfactorMethod of the ASHRAE901_*_Denver models, minus signs included
    expected = [7.1, 3.0, -1.0, 0.8, -0.2, 4.8, 6.1, 13.7, 22.2, 22.7, 21.7, 18.5]
    assert load_weather("Cool_Dry").ground == pytest.approx(expected, abs=0.06)


def test_sampling_interpolates_and_closes_the_year():
    weather = Weather("w", np.arange(8760.0), np.arange(8760.0), np.arange(12.0))
    outdoor, ghi, ground = weather.sampled(900)
    assert outdoor[:5].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert outdoor[-1] == pytest.approx(8759 * 0.25)  # a quarter to midnight: three quarters of the way to hour 0
    assert ghi.shape == outdoor.shape == ground.shape == (35_040,)
    assert [ground[0], ground[31 * 96 - 1], ground[31 * 96], ground[-1]] == [0, 0, 1, 11]


@pytest.mark.parametrize("climate", CLIMATES)
def test_every_climate_has_a_plausible_year(climate):
    weather = load_weather(climate)
    assert weather.outdoor.shape == weather.ghi.shape == (8760,)
    assert -40 < weather.outdoor.min() < weather.outdoor.mean() < weather.outdoor.max() < 55
    assert weather.ghi.min() == 0
    assert 700 < weather.ghi.max() < 1300
    assert weather.ghi.reshape(365, 24)[:, :3].max() == 0  # no sun before 3 in the morning


def test_climates_differ_as_their_names_say():
    mean = {name: load_weather(name).outdoor.mean() for name in CLIMATES}
    assert mean["Very_Hot_Humid"] > mean["Hot_Humid"] > mean["Warm_Humid"] > mean["Cool_Humid"]
    assert mean["Hot_Dry"] > mean["Warm_Dry"] > mean["Cool_Dry"]


def test_unknown_and_unshipped_climates_are_sentences():
    with pytest.raises(ConfigError, match=r"Did you mean 'Hot_Dry'.*epw: PATH"):
        load_weather("Hot_Dri")
    for name, station in WITHOUT_STATION.items():
        with pytest.raises(ConfigError, match=f"{name}.*no weather of {station}.*epw: PATH.*Hot_Dry"):
            load_weather(name)
    assert load_weather("Boulder").name == "Boulder"  # any shipped station by its own name
