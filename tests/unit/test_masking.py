"""Masking: secrets are not shown, the rest is."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kser import masking
from kser.masking import MASK, looks_secret, mask, mask_text


@pytest.mark.parametrize(
    "name",
    [
        "password", "PASSWORD", "db_password", "sasl.password", "passwordHash", "passphrase", "user-passwd",
        "secret", "client_secret", "AWSSecretAccessKey", "token", "accessToken", "x-auth-token", "tokens",
        "key", "keys", "api_key", "apiKey", "apikey", "APIKey", "x-api-key", "S3Key", "privateKeyPem",
        "credential", "credentials", "Authorization",
    ],
)  # fmt: skip
def test_names_that_look_secret(name):
    assert looks_secret(name)


@pytest.mark.parametrize("name", ["monkey", "keyboard", "hockey", "author", "order", "pass", "", "turkeys", "42", "é"])
def test_names_that_do_not(name):
    assert not looks_secret(name)


def test_values_under_secret_names_are_masked_at_any_depth_and_the_argument_is_not_changed():
    given_ = {"user": "ann", "db": [{"password": "p", "host": "h"}], "auth": {"token": {"a": 1}}, "n": (1, 2)}
    before = repr(given_)
    assert mask(given_) == {
        "user": "ann",
        "db": [{"password": MASK, "host": "h"}],
        "auth": {"token": MASK},
        "n": [1, 2],
    }
    assert repr(given_) == before


def test_nothing_there_is_shown_as_it_is():
    assert mask({"password": None, "token": "", "key": {}, "secret": []}) == {
        "password": None, "token": "", "key": {}, "secret": [],
    }  # fmt: skip


def test_further_words_come_from_the_environment_at_each_use(monkeypatch):
    assert mask({"iban": "DE1", "pin": "7"}) == {"iban": "DE1", "pin": "7"}
    monkeypatch.setenv("KSER_SECRET_WORDS", "iban, PIN ,")
    assert mask({"iban": "DE1", "pin": "7", "spinner": "x"})["iban"] == MASK
    assert mask({"pin": "7"}) == {"pin": MASK}


def test_what_refers_to_itself_or_is_nested_too_deep_is_said_to_be_so_and_nothing_raises():
    circle = {"a": 1}
    circle["self"] = circle
    deep = []
    for _ in range(5000):
        deep = [deep]
    for value in (circle, deep, {"password": "p", "deep": deep}):
        assert mask(value) == "(nested too deep to be shown)"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), json_values), st.text(min_size=1))
@settings(deadline=None)
def test_a_secret_is_never_in_what_is_shown(params, secret):
    params = {name: value for name, value in params.items() if secret not in repr(value) and secret not in name}
    shown = mask(params | {"deep": [{"api_token": "\x00" + secret + "\x00"}]})
    assert "\x00" + secret + "\x00" not in str(shown["deep"])
    assert shown["deep"] == [{"api_token": MASK}]
    assert set(shown) == set(params) | {"deep"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("login failed: password=hunter2, user=ann", "login failed: password=********, user=ann"),
        ("{'api_key': 'abc def', 'n': 1}", "{'api_key': ********, 'n': 1}"),
        ('{"token": "abc', '{"token": ********'),
        ("GET https://ann:hunter2@host/x?token=1&a=2", "GET https://ann:********@host/x?token=********&a=2"),
        ("to postgresql://ann:p@ss:w@host/x", "to postgresql://ann:********@host/x"),
        ("authorization: Bearer abc.def\nnext", "authorization: ********\nnext"),
        ("Authorization: Bearer abc.def", "Authorization: ********"),
        ("KeyError: 'password'", "KeyError: 'password'"),
        ("no secret, a=1, {'b': 2}", "no secret, a=1, {'b': 2}"),
        ("Task(params={'a': 1, 'token': 'abc'})", "Task(params={'a': 1, 'token': ********})"),
        ("params=[{'password': 'hunter2'}]", "params=[{'password': ********}]"),
        ("{'params': {'password': 'hunter2'}}", "{'params': {'password': ********}}"),
        ("passwords=['hunter2', 'swordfish'], n=1", "passwords=********, n=1"),
        ("a=[b=[password=hunter2", "a=[b=[password=********"),
    ],
)
def test_what_is_written_beside_secret_names_is_not_shown(text, shown):
    assert mask_text(text) == shown


def test_what_is_nested_deep_is_masked_within_the_time_limit_of_a_test():
    """It takes less than a second; were it looked to the end of each list, it would be minutes."""
    for text in ("a=[" * 400_000 + "password=x", "password={" * 200_000, "x={'key': [1, " * 80_000):
        assert mask_text(text).count("[") <= text.count("[")


lines = st.lists(
    st.sampled_from(
        ['"password"', "'token':", '"host":', ":", "", "  ", "x = 5", "api_key=abc", 'secret="a b"', "Authorization:",
         "Basic abc", "authorization: Bearer x", "amqp://u:p@h/", '  "hunter2"', "plain", "def f():", "\x85",
         "password="]
    ),
    max_size=40,
)  # fmt: skip


@given(lines, st.sampled_from(["\n", "\n\n", " ", "\r\n"]), st.integers(1, 30))
def test_a_long_text_is_masked_line_by_line_as_if_at_once(parts, between, times):
    text = between.join(parts * times)
    assert mask_text(text) == masking._mask_text(text, "")


def test_a_secret_in_the_line_after_its_name_is_masked_in_a_long_text():
    for form in ('"password":\n  "hunter2"', "'token'\n\n: hunter2", "Authorization:\nhunter2"):
        assert "hunter2" not in mask_text("x = 5\n" * 200 + form + "\nplain\n" * 200)


def test_words_of_the_environment_count_for_texts_that_were_seen_before(monkeypatch):
    text = "pin=1234\n" * 200
    assert "1234" in mask_text(text)
    monkeypatch.setenv("KSER_SECRET_WORDS", "pin")
    assert "1234" not in mask_text(text)
