"""MovieLens-1M, from the user's own folder: who rated which movie with how many stars."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyens.data._text import Fields, read_fields
from pyens.data.table import Table, split

AGES = (1, 18, 25, 35, 45, 50, 56)  # the youngest of each of the seven groups, as the files have it
OCCUPATIONS = 21
GENDERS = ("F", "M")
GENRES = (
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
TRAIN_SHARE = 0.6
LAYOUTS = {
    "ratings.dat": "UserID::MovieID::Rating::Timestamp",
    "users.dat": "UserID::Gender::Age::Occupation::Zip-code",
    "movies.dat": "MovieID::Title::Genres",
}


@dataclass(frozen=True, eq=False)
class MovieLens(Table):
    """Ratings, one row each, in the order of the file.

    The categorical columns are user, movie, age group and occupation, the numeric ones gender (F 0, M 1) and
    a 0 or 1 for each of the 18 `GENRES`; the target is the rating. Users and movies are numbered by ascending
    id, whether or not they were rated.
    """

    user_ids: Tensor  # [users] int64, ascending: the id of each user
    movie_ids: Tensor  # [movies] int64, ascending
    titles: tuple[str, ...]  # of the movies, in the order of movie_ids; identifies a movie as its id does

    @property
    def rating(self) -> Tensor:
        """The target: stars, 1 to 5, float32 `[N]`."""
        return self.target

    @property
    def labels(self) -> Tensor:
        """The rating as a class: rating - 1, 0 to 4, int64 `[N]`, made anew with each call."""
        return self.target.long() - 1


def load_movielens(folder: str | os.PathLike[str], *, seed: int = 0) -> MovieLens:
    """MovieLens-1M for the prediction of ratings, with a random split into 60 % and 40 %.

    Reads `ratings.dat`, `users.dat` and `movies.dat` in `folder` (fields between "::", latin-1, gzip also).
    Timestamps and zip codes are not kept. Lines may end as on Windows.

    Args:
        folder: where the files lie, as they are unpacked.
        seed: of the permutation of all rows whose first round(0.6 N) are `train`.

    Returns:
        MovieLens, the same for the same files and seed. With embeddings of 8, 8, 3 and 5 numbers, a model of
        it has 24 + 19 = 43 inputs.

    Raises:
        FileNotFoundError: without one of the files.
        ValueError: for a line of another form, naming file and line: another number of fields, no integer
            where one is expected, an unknown gender, age, occupation, genre, user or movie, a rating outside
            1..5, a user or movie listed twice; for a damaged gzip file, naming it.

    Source: F. Maxwell Harper and Joseph A. Konstan, "The MovieLens Datasets: History and Context", 2015;
    features and split of "Beyond Point Estimate", sections 3 and 4.
    """
    folder = Path(folder)
    _check_files(folder)
    user_ids, people, gender = _read_users(folder / "users.dat")
    movie_ids, titles, genres = _read_movies(folder / "movies.dat")
    user, movie, rating = _read_ratings(folder / "ratings.dat", user_ids, movie_ids)

    train, test = split(len(rating), TRAIN_SHARE, seed)
    return MovieLens(
        categorical=torch.from_numpy(np.column_stack([user, movie, people[user]])),
        numeric=torch.from_numpy(np.column_stack([gender[user], genres[movie]])),
        target=torch.from_numpy(rating.astype(np.float32)),
        categories=(len(user_ids), len(movie_ids), len(AGES), OCCUPATIONS),
        train=train,
        test=test,
        user_ids=torch.from_numpy(user_ids),
        movie_ids=torch.from_numpy(movie_ids),
        titles=titles,
    )


def _check_files(folder: Path) -> None:
    missing = [name for name in LAYOUTS if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"load_movielens: {folder}: expected {', '.join(LAYOUTS)}, found no {', '.join(missing)}; "
            "they are in ml-1m.zip of https://grouplens.org/datasets/movielens/1m/"
        )


def _read_users(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids [users] in ascending order, age group and occupation [users, 2] int64, gender [users] float32."""
    ids, people, genders = [], [], []
    for fields in _fields(path):
        ids.append(fields.integers(0)[0])
        gender = np.array(fields.text(1))
        fields.require(np.isin(gender, GENDERS), 1, "F or M")
        age, _ = fields.integers(2)
        fields.require(np.isin(age, AGES), 2, f"one of the ages {', '.join(map(str, AGES))}")
        occupation, _ = fields.integers(3)
        inside = (occupation >= 0) & (occupation < OCCUPATIONS)
        fields.require(inside, 3, f"an occupation in 0..{OCCUPATIONS - 1}")
        people.append(np.column_stack([np.searchsorted(AGES, age), occupation]))
        genders.append((gender == "M").astype(np.float32))
    order, sorted_ids = _ascending(path, "user", np.concatenate(ids))
    return sorted_ids, np.concatenate(people)[order], np.concatenate(genders)[order]


def _read_movies(path: Path) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
    """Ids [movies] in ascending order, titles, genres [movies, 18] float32."""
    ids: list[np.ndarray] = []
    titles: list[str] = []
    genres: list[np.ndarray] = []
    position = {genre: i for i, genre in enumerate(GENRES)}
    for fields in _fields(path):
        ids.append(fields.integers(0)[0])
        titles += fields.text(1)
        hot = np.zeros((len(fields), len(GENRES)), np.float32)
        for row, names in enumerate(fields.text(2)):
            for name in names.split("|"):
                if name not in position:
                    fields.refuse(row, f"genres among {', '.join(GENRES)}", repr(name))
                hot[row, position[name]] = 1
        genres.append(hot)
    order, sorted_ids = _ascending(path, "movie", np.concatenate(ids))
    return sorted_ids, tuple(titles[i] for i in order.tolist()), np.concatenate(genres)[order]


def _read_ratings(
    path: Path, user_ids: np.ndarray, movie_ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of users and movies, and ratings, int64 [N] each."""
    columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for fields in _fields(path):
        user = _numbers(fields, 0, user_ids, "a user of users.dat")
        movie = _numbers(fields, 1, movie_ids, "a movie of movies.dat")
        rating, _ = fields.integers(2)
        fields.require((rating >= 1) & (rating <= 5), 2, "a rating in 1..5")
        fields.integers(3)
        columns.append((user, movie, rating))
    user, movie, rating = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    return user, movie, rating


def _fields(path: Path) -> Iterator[Fields]:
    layout = LAYOUTS[path.name]
    return read_fields("load_movielens", path, "::", len(layout.split("::")), layout)


def _numbers(fields: Fields, column: int, ids: np.ndarray, expected: str) -> np.ndarray:
    """Where the column's ids stand among all."""
    found, _ = fields.integers(column)
    number = np.searchsorted(ids, found).clip(max=len(ids) - 1)
    fields.require(ids[number] == found, column, expected)
    return number


def _ascending(path: Path, what: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of the rows by id, and the ids in it; each row has an id of its own."""
    order = np.argsort(ids, kind="stable")
    again = order[1:][np.diff(ids[order]) == 0]
    if again.size:
        row = again.min()
        first = np.flatnonzero(ids == ids[row])[0]
        raise ValueError(
            f"load_movielens: {path}:{row + 1}: expected each {what} once, "
            f"got {ids[row]} again after line {first + 1}"
        )
    return order, ids[order]
