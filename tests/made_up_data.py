"""Small files in the formats of the data sets that pyens reads, made up from a seed."""

from pathlib import Path

import torch

from pyens.data.movielens import AGES, GENRES, OCCUPATIONS


def write_movielens(folder: Path, *, users: int = 30, movies: int = 20, ratings: int = 400, seed: int = 0):
    """The three files of MovieLens-1M, sorted as those: ids with gaps, each rating of another pair.

    Users and movies have a taste and an appeal of their own, so that there is something to learn.
    """
    g = torch.Generator().manual_seed(seed)

    def draw(high: int, count: int) -> list[int]:
        return torch.randint(high, (count,), generator=g).tolist()

    user_ids = (torch.randperm(2 * users, generator=g)[:users].sort().values + 1).tolist()
    movie_ids = (torch.randperm(2 * movies, generator=g)[:movies].sort().values + 1).tolist()
    people = zip(user_ids, draw(2, users), draw(len(AGES), users), draw(OCCUPATIONS, users), strict=True)
    lines = [f"{u}::{'FM'[gender]}::{AGES[age]}::{job}::{10000 + u}-x\n" for u, gender, age, job in people]
    (folder / "users.dat").write_text("".join(lines), encoding="latin-1")

    lines = []
    for movie, count in zip(movie_ids, draw(3, movies), strict=True):
        genres = sorted({GENRES[i] for i in draw(len(GENRES), 1 + count)})
        lines.append(f"{movie}::Été: the {movie}th (1999)::{'|'.join(genres)}\n")
    (folder / "movies.dat").write_text("".join(lines), encoding="latin-1")

    taste, appeal = torch.randn(users, generator=g), torch.randn(movies, generator=g)
    lines = []
    for pair in torch.randperm(users * movies, generator=g)[:ratings].sort().values.tolist():
        u, m = divmod(pair, movies)
        stars = int((3.5 + taste[u] + appeal[m]).round().clamp(1, 5))
        lines.append(f"{user_ids[u]}::{movie_ids[m]}::{stars}::{956703932 + pair}\n")
    (folder / "ratings.dat").write_text("".join(lines), encoding="latin-1")
    return folder


def write_criteo(folder: Path, *, rows: int = 300, seed: int = 0) -> Path:
    """`train.txt` of the Criteo data: skewed counts, some negative, and a fifth of all values missing."""
    g = torch.Generator().manual_seed(seed)
    counts = (torch.randn(rows, 13, generator=g) * 2).exp().long() - 1
    categories = (torch.randn(rows, 26, generator=g) * 3).long() * 1_234_567_891 % 2**32
    missing = (torch.rand(rows, 39, generator=g) < 0.2).tolist()
    clicks = torch.rand(rows, generator=g) < counts.clamp(0, 9).double().mean(1) / 9
    lines = []
    for click, count, category, absent in zip(
        clicks.tolist(), counts.tolist(), categories.tolist(), missing, strict=True
    ):
        values = [*map(str, count), *(f"{c:08x}" for c in category)]
        fields = ["" if gone else value for gone, value in zip(absent, values, strict=True)]
        lines.append("\t".join([str(int(click)), *fields]) + "\n")
    (folder / "train.txt").write_text("".join(lines))
    return folder


def write_uci(
    folder: Path,
    *,
    rows: int = 60,
    features: int = 3,
    splits: int = 2,
    noise: float = 0.3,
    seed: int = 0,
    nested: bool = True,
) -> Path:
    """A set of the UCI benchmark: normal features in columns 0, 2, 3, ..., the target in column 1.

    The target is `20 + 5 (x_0 + ... )` over the root of their number, plus 5 times normal noise. A tenth of
    the rows are each split's test rows. `nested`: the files in a folder `data`.
    """
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=g, dtype=torch.float64)
    y = x.sum(1) / features**0.5 + noise * torch.randn(rows, generator=g, dtype=torch.float64)
    table = torch.cat([x[:, :1], 20 + 5 * y[:, None], x[:, 1:]], 1)
    place = folder / "data" if nested else folder
    place.mkdir(parents=True)

    def write(name: str, numbers: list) -> None:
        (place / f"{name}.txt").write_text("".join(f"{number}\n" for number in numbers))

    write("data", ["\t ".join(map(repr, line)) + " " for line in table.tolist()])
    write("index_features", [0, *range(2, features + 1)])
    write("index_target", [1])
    write("n_splits", [splits])
    for i in range(splits):
        order = torch.randperm(rows, generator=g).tolist()
        write(f"index_train_{i}", order[rows // 10 :])
        write(f"index_test_{i}", order[: rows // 10])
    return folder
