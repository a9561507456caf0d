"""Signatures, annotations and docstrings, read into schemas; values, checked against them."""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, Union

import pytest

from lightrail.catalogue.annotations import evaluated, form_of, text_of
from lightrail.catalogue.docstrings import parameter_lines, summary_of
from lightrail.catalogue.forms import accepts, describe
from lightrail.catalogue.signature import schema_of, source_files
from lightrail.errors import PluginError
from lightrail.traits import Traits

if TYPE_CHECKING:
    from somewhere import Tensor  # type: ignore[import-not-found]


class Opaque:
    """What YAML cannot spell."""


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        (int, [1, -3], [1.5, "1", True, None]),
        (float, [1, 0.5, float("inf")], ["fast", True, None]),
        (bool, [True, False], [0, 1, "true"]),
        (str, ["x", ""], [1, None, ["x"]]),
        (Path, ["a/b"], [1]),
        (Literal["a", 1], ["a", 1], ["b", 2, True]),
        (Literal[True], [True], [1]),
        (Optional[int], [1, None], ["x"]),  # noqa: UP045
        (Union[float, Opaque], [1.0, {"_target_": "x.Y"}], ["x"]),  # noqa: UP007
        (float | str, [1.0, "x"], [[1.0], None]),
        (tuple[float, float], [[1, 2], (0.5, 0.5)], [[1], [1, 2, 3], 1, ["a", "b"], "ab"]),
        (tuple[int, ...], [[], [1, 2, 3]], [["a"], 1]),
        (list[int], [[1]], [["a"], "a", 1]),
        (Sequence[str], [["a"]], ["a", [1]]),
        (list, [[1, "a"]], ["a"]),
        (dict[str, int], [{"a": 1}, {}], [{"a": "b"}, [1]]),
        (Mapping[str, Any], [{"a": "b"}], [1]),
        (Callable[[int], int], ["math.sin", {"_target_": "x.y"}], [1, "sin"]),
        (type[Opaque], ["mine.Class"], [3]),
        (Annotated[int, "steps"], [1], ["x"]),
        (Any, [1, "x", None, [1]], []),
        (Opaque, [1, "x", {"_target_": "x.Y"}], []),
        (Opaque | None, [1, None], []),
        (list[tuple[int, int]], [[[1, 2]]], [[[1]]]),
    ],
)
def test_what_an_annotation_allows(annotation: Any, good: list[Any], bad: list[Any]) -> None:
    form = form_of(annotation)
    assert [value for value in good if not accepts(form, value)] == []
    assert [value for value in bad if accepts(form, value)] == []
    assert describe(form)
    assert text_of(annotation)


def test_an_annotation_of_a_name_for_type_checkers_keeps_the_rest() -> None:
    form = form_of(evaluated("tuple[float | Tensor, float | Tensor]", globals()))
    assert form == {"is": "tuple", "of": [{"is": "float"}, {"is": "float"}]}
    assert form_of(evaluated("this is no type", {})) == {"is": "any"}
    assert form_of(evaluated("a.b.c | int", {})) == {"is": "any"}


class Colour(enum.Enum):
    RED = 1


class Base:
    """A base."""

    def __init__(self, inherited: int = 1) -> None: ...


class Full(Base):
    """Does one thing. Then another.

    It has a second paragraph.

    Args:
        first: What it is
            made of: parts.
        second (float, optional): In seconds, see :class:`~torch.nn.Module` and ``code``.
        *rest: More.

    Returns:
        third: Nothing.
    """

    traits = Traits(needs_closure=True, example={"first": 2, "limits": (1, float("inf"))})

    def __init__(
        self,
        positional: int,
        /,
        first: int,
        second: float | Tensor = 0.1,
        third=None,
        *rest: int,
        path: Path = Path("a/b"),
        pair: tuple[float, float] = (0.9, 0.99),
        nested: dict[str, Any] = {"a": (1, 2)},  # noqa: B006
        colour: Colour = Colour.RED,
        dangerous: str = "${x}",
        maker: type = int,
        odd: int = 0.5,  # type: ignore[assignment]
    ) -> None: ...


class TestSchema:
    def test_what_stands_in_the_node(self) -> None:
        schema = schema_of("callback", "x.Full", type("Callback", (Full,), {"__init__": Full.__init__}))
        assert schema.defaults() == {
            "second": 0.1, "third": None, "path": "a/b", "pair": [0.9, 0.99], "nested": {"a": [1, 2]}, "odd": 0.5,
        }  # fmt: skip

    def test_what_may_be_given_beside(self) -> None:
        schema = schema_of("privacy", "x.Full", Full)
        names = [each.name for each in schema.parameters]
        assert names == [
            "first", "second", "third", "path", "pair", "nested", "colour", "dangerous", "maker", "odd",
        ]  # fmt: skip
        assert [each.name for each in schema.parameters if each.required] == ["first"]
        assert not schema.accepts_any_key

    def test_words(self) -> None:
        schema = schema_of("privacy", "x.Full", Full)
        assert schema.summary == "Does one thing."
        docs = {each.name: each.doc for each in schema.parameters}
        assert docs["first"] == "What it is made of: parts."
        assert docs["second"] == "In seconds, see Module and code."
        assert docs["third"] == ""

    def test_traits_are_plain(self) -> None:
        traits = schema_of("privacy", "x.Full", Full).traits
        assert traits == {"needs_closure": True, "example": {"first": 2, "limits": [1, "inf"]}}

    def test_a_class_without_words_is_silent(self) -> None:
        assert schema_of("privacy", "x.S", type("Silent", (Full,), {})).summary == ""

    def test_what_the_platform_supplies(self) -> None:
        def schedule(optimizer: Any, total_steps: int, *, warmup: int = 0) -> None: ...

        schema = schema_of("schedule", "x.schedule", schedule)
        assert schema.supplied == ("optimizer", "total_steps")
        assert schema.defaults() == {"warmup": 0}
        assert schema_of("optimizer", "x.make", lambda things, lr=1.0: None).supplied == ("things",)

    def test_dataclasses_partials_and_what_c_wrote(self) -> None:
        @dataclasses.dataclass
        class Options:
            """Options."""

            rate: float = 0.5
            when: Literal["now", "later"] = "now"

        assert schema_of("privacy", "x.O", Options).parameter("when").choices == ("now", "later")  # type: ignore[union-attr]
        partial = functools.partial(Options, rate=0.25)
        assert schema_of("privacy", "x.p", partial).defaults()["rate"] == 0.25
        assert schema_of("privacy", "x.iter", iter).accepts_any_key

    def test_what_is_no_plugin(self) -> None:
        for kind, thing in (("optimizer", Opaque), ("privacy", 3)):
            with pytest.raises(PluginError):
                schema_of(kind, "x.y", thing)

    def test_its_files_are_those_of_its_ancestors(self) -> None:
        files = source_files(Full)
        assert any(file.endswith("test_catalogue_signature.py") for file in files)
        assert source_files(type("Other", (argparse_like(),), {"__module__": __name__})) != files


def argparse_like() -> type:
    import argparse

    return argparse.ArgumentParser


def test_torchs_own_optimizers() -> None:
    import torch

    schema = schema_of("optimizer", "torch.optim.AdamW", torch.optim.AdamW)
    assert schema.supplied == ("params",)
    forms = {each.name: each.form for each in schema.parameters}
    assert accepts(forms["lr"], 1)
    assert not accepts(forms["lr"], "fast")
    assert not accepts(forms["betas"], [0.9])
    assert accepts(forms["foreach"], None)


def test_docstrings_of_any_shape() -> None:
    assert summary_of(None) == summary_of("") == ""
    assert (
        summary_of("e.g. this one stays whole, i.e. uncut. The next goes.") == "e.g. this one stays whole, i.e. uncut."
    )
    assert parameter_lines(None) == {}
    assert parameter_lines("One.\n\nArgs:\n  x: a\n\n  y: b\nOther text\n  z: c") == {"x": "a", "y": "b"}
