"""Text through every reader of a command line: Hydra's parser and configuration, OmegaConf, and the scripts' own arguments."""

from __future__ import annotations

import random
import shlex
from dataclasses import dataclass

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from co3d_ensemble.base.quoting import DEVICE, escaped, for_device, is_quoted, literal, override, quoted, unquoted, with_escapes
from co3d_ensemble.scripts import parsed
from co3d_ensemble.settings import literal_settings, setting

PIECES = ("a", "B", "7", " ", "'", '"', "\\", "\\\\", "$", "{", "}", "${", "\\${", "[", "]", "(", ")", ",", "=", "#", ":", "/")
PIECES += (".", "é", "数", "😀")
PIECES += ("null", "true", "1e3", "~", "*", "?", "!", "&", "|", ";", "%", "@", "+", "-", "\t", "{device}", "x=1", "- ", ": ", " #")
FOLDERS = ("mes données, essai=2 (1)/co3d [v2] #1", "lien vers données", "it's", 'a "b"', "back\\slash\\", "${HOME}", "{device}")
FOLDERS += ("null", "1e3", "'in'", "True", "inf", "nan", "plain/name_1.x-y", "TRUE.d", "trueish", "/", "_", "-", ".")
PARSER = OverridesParser.create()


@dataclass
class Inner:
    root: str | None = setting(None, "a folder", literal=True)


@dataclass
class Schema:
    path: str = setting("", "a file", literal=True)
    name: str = setting("", "anything")
    inner: Inner = setting(Inner, "more")


def random_texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choice(PIECES) for _ in range(rng.randint(1, 9))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(4))
def test_any_text_comes_back_from_hydra_s_parser_and_from_the_scripts_arguments(seed):
    for text in [*random_texts(seed, 120), *FOLDERS]:
        argument = override("name", text)
        node = OmegaConf.create({"name": PARSER.parse_override(argument).value()})
        assert node.name == text, argument
        assert parsed([argument], Schema).name == text, argument
        assert OmegaConf.create(OmegaConf.to_yaml(node)).name == text


@pytest.mark.parametrize("seed", range(2))
def test_what_is_in_quotes_is_read_as_hydra_reads_it(seed):
    """Also with the quotes that a user chose; the parsers agree on what is in quotes as a whole."""
    for text in random_texts(seed, 200):
        for quote in "'\"":
            body = text.replace("\\", "").replace(quote, "\\" + quote)
            assert is_quoted(quote + body + quote)
            assert unquoted(quote + body + quote) == PARSER.parse_override(f"name={quote}{body}{quote}").value()


@pytest.mark.parametrize("text", ["", "a", "'", "'a", "a'", "'a' b'", "'a\\'", "'a''b'", "\"a'"])
def test_what_is_not_in_quotes_as_a_whole_is_not_quoted(text):
    assert not is_quoted(text)
    with pytest.raises(ValueError, match="in quotes"):
        unquoted(text)


def test_numbers_truth_values_and_none_stay_what_they_are():
    assert [override("k", value) for value in (3, 0.5, True, None)] == ["k=3", "k=0.5", "k=true", "k=null"]


@pytest.mark.parametrize("seed", range(2))
def test_paths_that_a_user_types_without_quotes_are_taken_literally(seed):
    keys = literal_settings(Schema)
    assert keys == {"path", "inner.root"}
    for text in [*random_texts(seed, 60), *FOLDERS]:
        typed = quoted(text) if is_quoted(text) or text == "null" else text  # the two cases in which quotes are needed
        arguments = [f"path={typed}", f"inner.root={typed}"]
        given = parsed(arguments, Schema)
        assert (given.path, given.inner.root) == (text, text)
        for argument in literal([*arguments, f"+path={typed}", f"members.m1.overrides.inner.root={typed}"], keys):
            value = argument.partition("=")[2]
            assert OmegaConf.create({"x": PARSER.parse_override(f"x={value}").value()}).x == text
        assert literal(literal(arguments, keys), keys) == literal(arguments, keys)


def test_null_and_settings_that_are_no_text_stay_as_they_are():
    arguments = ["inner.root=null", "path=", "name=[a,b]", "other=1", "--cfg"]
    assert literal(arguments, literal_settings(Schema)) == arguments
    assert parsed(["inner.root=null"], Schema).inner.root is None


def test_a_name_that_is_no_text_is_refused_with_advice():
    with pytest.raises(ValueError, match="not UTF-8.*symbolic link"):
        literal(["path=/data/\udcff"], {"path"})


@pytest.mark.parametrize("seed", range(2))
def test_plain_values_become_a_configuration_and_come_back(seed):
    value = {"texts": random_texts(seed, 100), "n": 3, "nested": {"text": "${x}"}}
    assert OmegaConf.to_container(OmegaConf.create(with_escapes(value)), resolve=True) == value
    assert escaped("no interpolation \\ here $") == "no interpolation \\ here $"


def test_only_the_argument_that_says_so_names_the_device():
    command = ["python", "output_dir='/a/{device}'", DEVICE]
    assert for_device(command, "cuda:1") == ["python", "output_dir='/a/{device}'", "device=cuda:1"]
    assert shlex.split(shlex.join(command)) == command
