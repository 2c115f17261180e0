"""The loader of MovieLens-1M, on small made-up files of the same format and on the real ones."""

import dataclasses
import gzip
import re

import pytest
import torch
from made_up_data import write_movielens

from pyens.data import _text, load_movielens
from pyens.data.movielens import AGES, GENRES


def written_out(folder):
    """The features and ratings of each line, read the plain way."""

    def lines(name):
        return [line.split("::") for line in (folder / name).read_text("latin-1").splitlines()]

    users = {int(u): (g, int(a), int(o)) for u, g, a, o, _ in lines("users.dat")}
    movies = {int(m): (title, genres.split("|")) for m, title, genres in lines("movies.dat")}
    user_of, movie_of = sorted(users), sorted(movies)
    categorical, numeric, ratings = [], [], []
    for user, movie, rating, _ in lines("ratings.dat"):
        gender, age, occupation = users[int(user)]
        numbers = user_of.index(int(user)), movie_of.index(int(movie)), AGES.index(age), occupation
        categorical.append(numbers)
        genres = movies[int(movie)][1]
        numeric.append([float(gender == "M"), *(float(genre in genres) for genre in GENRES)])
        ratings.append(float(rating))
    titles = tuple(movies[m][0] for m in movie_of)
    tensors = torch.tensor(categorical), torch.tensor(numeric), torch.tensor(ratings)
    return *tensors, user_of, movie_of, titles


def check(folder):
    data = load_movielens(folder)
    categorical, numeric, ratings, user_ids, movie_ids, titles = written_out(folder)
    assert torch.equal(data.categorical, categorical) and data.categorical.dtype == torch.int64
    assert torch.equal(data.numeric, numeric) and data.numeric.dtype == torch.float32
    assert torch.equal(data.target, ratings) and data.target.dtype == torch.float32
    assert data.user_ids.tolist() == user_ids and data.movie_ids.tolist() == movie_ids
    assert data.titles == titles
    assert data.categories == (len(user_ids), len(movie_ids), 7, 21)
    return data


def test_features_are_those_of_the_lines(tmp_path):
    data = check(write_movielens(tmp_path))
    assert len(data) == 400 and data.numeric.shape == (400, 19)
    assert data.rating is data.target
    assert torch.equal(data.labels, data.target.long() - 1) and data.labels.dtype == torch.int64
    assert data.titles[0].startswith("Été: ")  # latin-1, and a colon in a field


def test_lines_may_end_as_on_windows(tmp_path):
    for path in write_movielens(tmp_path).glob("*.dat"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    check(tmp_path)


def test_blocks_do_not_matter(tmp_path, monkeypatch):
    write_movielens(tmp_path)
    for block in (1, 7, 100, 1000):
        monkeypatch.setattr(_text, "BLOCK", block)
        check(tmp_path)


def test_order_of_users_and_movies_does_not_matter(tmp_path):
    write_movielens(tmp_path)
    expected = load_movielens(tmp_path)
    for name in ("users.dat", "movies.dat"):
        lines = (tmp_path / name).read_bytes().splitlines(keepends=True)
        (tmp_path / name).write_bytes(b"".join(lines[::-1]))
    data = check(tmp_path)
    assert torch.equal(data.categorical, expected.categorical) and data.titles == expected.titles


def test_the_last_line_may_lack_its_newline(tmp_path):
    write_movielens(tmp_path)
    for name in ("ratings.dat", "users.dat", "movies.dat"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
    assert len(check(tmp_path)) == 400


def test_a_single_rating_and_zipped_files(tmp_path):
    write_movielens(tmp_path, users=1, movies=1, ratings=1)
    (train,) = check(tmp_path).train.tolist()
    assert train == 0
    (tmp_path / "ratings.dat").write_bytes(gzip.compress((tmp_path / "ratings.dat").read_bytes()))
    assert len(load_movielens(tmp_path)) == 1


def test_a_title_may_end_in_a_colon(tmp_path):
    write_movielens(tmp_path, users=1, movies=2, ratings=2)
    first, second = (tmp_path / "movies.dat").read_text("latin-1").splitlines()
    movie = second.split("::")[0]
    # As bytes.split has it: the first two of three colons separate, and " Part" keeps its own.
    (tmp_path / "movies.dat").write_text(f"{first}\n{movie}:::Part: 2::Drama\n", "latin-1")
    assert load_movielens(tmp_path).titles[1] == ":Part: 2"


@pytest.mark.parametrize("ratings", [1, 2, 3, 7, 399, 400])
def test_split(tmp_path, ratings):
    data = load_movielens(write_movielens(tmp_path, ratings=ratings))
    assert len(data.train) == round(0.6 * ratings)
    assert torch.cat([data.train, data.test]).sort().values.tolist() == list(range(ratings))
    rows = data.rows(data.test)
    assert torch.equal(rows.categorical, data.categorical[data.test])
    assert torch.equal(rows.numeric, data.numeric[data.test])
    assert torch.equal(rows.target, data.target[data.test])


def test_the_seed_decides_the_split(tmp_path):
    write_movielens(tmp_path)
    state = torch.get_rng_state()
    data, again, other = (load_movielens(tmp_path, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(data.train, again.train) and torch.equal(data.test, again.test)
    assert not torch.equal(data.train.sort().values, other.train.sort().values)
    assert torch.equal(data.categorical, other.categorical)
    expected = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat([data.train, data.test]), expected)
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.train = data.test


BAD = {  # file, what the line becomes (the others stay), message
    "fields": ("ratings.dat", "1::2::3", "expected 4 fields (UserID::MovieID::Rating::Timestamp), got 3"),
    "too many": ("ratings.dat", "1::2::3::4::5", "4 fields (UserID::MovieID::Rating::Timestamp), got 5 in "),
    "blank": ("ratings.dat", "", "expected 4 fields (UserID::MovieID::Rating::Timestamp), got 1 in ''"),
    "another separator": ("ratings.dat", "1\t2\t3\t4", r"got 1 in '1\t2\t3\t4'"),
    "user": ("ratings.dat", "{user}x::{movie}::3::0", "expected an integer, got '{user}x'"),
    "empty": ("ratings.dat", "::{movie}::3::0", "expected an integer, got ''"),
    "sign alone": ("ratings.dat", "{user}::-::3::0", "expected an integer, got '-'"),
    "two signs": ("ratings.dat", "{user}::--1::3::0", "expected an integer, got '--1'"),
    "space": ("ratings.dat", "{user}:: {movie}::3::0", "expected an integer, got ' {movie}'"),
    "unknown user": ("ratings.dat", "999::{movie}::3::0", "expected a user of users.dat, got '999'"),
    "negative user": ("ratings.dat", "-1::{movie}::3::0", "expected a user of users.dat, got '-1'"),
    "unknown movie": ("ratings.dat", "{user}::999::3::0", "expected a movie of movies.dat, got '999'"),
    "many digits": ("ratings.dat", "{user}::1234567890123456789::3::0", "an integer, got '12345678"),
    "no stars": ("ratings.dat", "{user}::{movie}::0::0", "expected a rating in 1..5, got '0'"),
    "six stars": ("ratings.dat", "{user}::{movie}::6::0", "expected a rating in 1..5, got '6'"),
    "half a star": ("ratings.dat", "{user}::{movie}::3.5::0", "expected an integer, got '3.5'"),
    "timestamp": ("ratings.dat", "{user}::{movie}::3::today", "expected an integer, got 'today'"),
    "gender": ("users.dat", "77::X::1::0::0", "expected F or M, got 'X'"),
    "age": ("users.dat", "77::F::17::0::0", "expected one of the ages 1, 18, 25, 35, 45, 50, 56, got '17'"),
    "occupation": ("users.dat", "77::F::1::21::0", "expected an occupation in 0..20, got '21'"),
    "user fields": ("users.dat", "77::F::1::0", "(UserID::Gender::Age::Occupation::Zip-code), got 4"),
    "same user": ("users.dat", "{user}::F::1::0::0", "each user once, got {user} again after line 1"),
    "genre": ("movies.dat", "77::Name::Drama|Opera", "expected genres among Action, "),
    "no genre": ("movies.dat", "77::Name::", "Western, got ''"),
    "movie fields": ("movies.dat", "77::Name", "3 fields (MovieID::Title::Genres), got 2 in '77::Name'"),
    "same movie": ("movies.dat", "{movie}::Name::Drama", "each movie once, got {movie} again after line 1"),
}  # fmt: skip


@pytest.mark.parametrize("block", [1 << 24, 50])
@pytest.mark.parametrize("case", BAD)
def test_bad_lines_are_named(tmp_path, monkeypatch, case, block):
    monkeypatch.setattr(_text, "BLOCK", block)
    name, line, message = BAD[case]
    write_movielens(tmp_path)
    first = {
        what: (tmp_path / f"{what}s.dat").read_text("latin-1").split("::")[0] for what in ("user", "movie")
    }
    lines = (tmp_path / name).read_text("latin-1").splitlines()
    lines[12] = line.format(**first)
    (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"^load_movielens: ") as raised:
        load_movielens(tmp_path)
    assert f"{tmp_path / name}:13: expected " in str(raised.value)
    assert message.format(**first) in str(raised.value)


def test_fields_too_few_and_too_many_do_not_make_up_for_each_other(tmp_path):
    write_movielens(tmp_path)
    lines = (tmp_path / "ratings.dat").read_text().splitlines()
    lines[5], lines[7] = "1::2::3", "1::2::3::4::5"
    (tmp_path / "ratings.dat").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"ratings\.dat:6: expected 4 fields .*, got 3 in '1::2::3'"):
        load_movielens(tmp_path)


def test_a_file_cut_short_is_named(tmp_path):
    write_movielens(tmp_path)
    content = (tmp_path / "ratings.dat").read_bytes()
    (tmp_path / "ratings.dat").write_bytes(content[: content.rindex(b"::") - 3])
    with pytest.raises(ValueError, match=r"ratings\.dat:400: expected 4 fields .*, got 2 in "):
        load_movielens(tmp_path)
    (tmp_path / "ratings.dat").write_bytes(gzip.compress(content)[:-20])
    with pytest.raises(ValueError, match=r"ratings\.dat: expected a whole gzip file, got "):
        load_movielens(tmp_path)
    (tmp_path / "ratings.dat").write_bytes(b"")
    with pytest.raises(ValueError, match=r"ratings\.dat: expected lines of UserID::.*, got an empty file"):
        load_movielens(tmp_path)


@pytest.mark.parametrize("name", ["ratings.dat", "users.dat", "movies.dat"])
def test_a_missing_file_is_named(tmp_path, name):
    (write_movielens(tmp_path) / name).unlink()
    with pytest.raises(FileNotFoundError) as raised:
        load_movielens(tmp_path)
    assert re.search(rf"{tmp_path}: expected .*, found no {name}; they are in ml-1m\.zip", str(raised.value))
    with pytest.raises(FileNotFoundError, match=r"found no ratings\.dat, users\.dat, movies\.dat;"):
        load_movielens(tmp_path / "absent")


def test_real_files(data_dir):
    data = load_movielens(data_dir("ml-1m"))
    assert data.rating.long().bincount().tolist() == [0, 56174, 107557, 261197, 348971, 226310]
    assert data.categories == (6040, 3883, 7, 21)
    assert data.categorical.shape == (1_000_209, 4) and data.numeric.shape == (1_000_209, 19)
    assert (len(data.train), len(data.test)) == (600_125, 400_084)
    assert len(data.categorical[:, 1].unique()) == 3706
    assert data.titles[data.categorical[0, 1]] == "One Flew Over the Cuckoo's Nest (1975)"
