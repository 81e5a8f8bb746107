"Guards on the Hugging Face Hub, which can lose the connection, refuse a token, or be away."

import json
import time

import huggingface_hub.constants
import pytest
import torch
from fake_hub import FakeHub

from cpsample.core.classifier import MLPClassifier
from cpsample.core.guard import Guard
from cpsample.core.guard_files import save_guard
from cpsample.core.schedule import make_schedule
from cpsample.judgement.guard_attacks_study import attack_words
from cpsample.production.hub import from_pretrained, push_to_hub
from cpsample.workshop.files import data_path


@pytest.fixture
def guard():
    classifier = MLPClassifier((1, 8, 8), K=2, width=64, depth=1)
    return Guard(classifier, make_schedule(), alpha=0.03, scale=5.0, report={"alpha": 0.03})


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch, cache):
    with FakeHub() as hub:
        for name, value in hub.settings(cache).items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's tries
        yield hub


def same(a, b):
    weights = zip(a.classifier.parameters(), b.classifier.parameters())
    settings_agree = (a.alpha, a.scale, a.report) == (b.alpha, b.scale, b.report)
    return settings_agree and all(torch.equal(p, q) for p, q in weights)


def one_line(told):
    return "\n" not in str(told.value)


def test_there_and_back(hub, guard):
    push_to_hub(guard, "me/secret", token="good")
    assert set(hub.files["me/secret"]) == {"guard.safetensors", "guard.json", "README.md"}
    assert "me/secret" not in hub.public
    assert same(from_pretrained("me/secret", token="good"), guard)


def test_the_card_says_what_it_is_and_how_it_is_loaded(hub, guard):
    push_to_hub(guard, "me/secret", token="good")
    card = hub.files["me/secret"]["README.md"].decode()
    assert "secret as those images" in card
    assert 'from_pretrained("me/secret")' in card
    assert "import cpsample\n" in card and "cpsample.load_guard(" in card

    # And what attackers got, from the record.
    record = json.loads(data_path("results/guard_attacks.json").read_text())
    for sentence in attack_words(record):
        assert f"\n- {sentence}\n" in card
    assert "ATTACKS" not in card and "log such counts, do not serve them" in card


def test_a_guard_is_not_put_where_all_can_see_it_unless_asked(hub, guard):
    hub.files["me/open"] = {}
    hub.public.add("me/open")
    refusal = "me/open is public, and a guard tells who was in the training set: make it private"
    with pytest.raises(ValueError, match=refusal):
        push_to_hub(guard, "me/open", token="good")
    assert hub.files["me/open"] == {}
    push_to_hub(guard, "me/open", private=False, token="good")
    assert same(from_pretrained("me/open"), guard)


def test_a_wrong_token(hub, guard):
    refusal = "^writing 'me/x' on the Hub failed: the token is wrong or missing: hf auth login"
    with pytest.raises(OSError, match=refusal) as told:
        push_to_hub(guard, "me/x", token="bad")
    assert one_line(told) and hub.files == {}
    push_to_hub(guard, "me/x", token="good")
    with pytest.raises(OSError, match="^reading 'me/x' on the Hub failed: .*token") as told:
        from_pretrained("me/x", token="bad")
    assert one_line(told)


def test_a_name_that_is_not_there(hub):
    refusal = "^reading 'me/none' on the Hub failed: there is no such repository"
    with pytest.raises(OSError, match=refusal) as told:
        from_pretrained("me/none", token="good")
    assert one_line(told)
    no_name = "^reading 'no such/name/at all' .* no such folder here, .* the form owner/name$"
    with pytest.raises(OSError, match=no_name) as told:
        from_pretrained("no such/name/at all")
    assert one_line(told)


def test_the_connection_breaks_and_the_next_run_goes_on(hub, cache, guard):
    push_to_hub(guard, "me/x", token="good")
    hub.cut = 100
    failure = "^reading 'me/x' on the Hub failed: .*connect to the network and try again"
    with pytest.raises(OSError, match=failure) as told:
        from_pretrained("me/x", token="good")
    assert one_line(told) and not list(cache.rglob("guard.safetensors"))
    hub.cut = 1
    assert same(from_pretrained("me/x", token="good"), guard)


def test_without_a_network_what_was_had_before_is_used(hub, guard, monkeypatch):
    push_to_hub(guard, "me/x", token="good")
    from_pretrained("me/x", token="good")
    nowhere = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere)
    assert same(from_pretrained("me/x", token="good"), guard)
    failure = "^reading 'me/other' on the Hub failed: .*connect to the network and try again"
    with pytest.raises(OSError, match=failure) as told:
        from_pretrained("me/other", token="good")
    assert one_line(told)


def test_an_error_without_words_is_told_by_its_name(hub, monkeypatch):
    class ReadTimeout(Exception):
        pass

    def slow(*_, **__):
        raise ReadTimeout

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", slow)
    failure = (
        "^reading 'me/x' on the Hub failed: ReadTimeout: connect to the network and try again$"
    )
    with pytest.raises(OSError, match=failure):
        from_pretrained("me/x")


def test_a_file_that_is_no_guard(hub):
    hub.files["me/x"] = {"guard.safetensors": b"nonsense" * 10}
    with pytest.raises(ValueError, match="cannot be read as a guard"):
        from_pretrained("me/x", token="good")


def test_a_folder(tmp_path, guard):
    save_guard(guard, tmp_path / "guard")
    assert same(from_pretrained(tmp_path), guard)
    assert same(from_pretrained(str(tmp_path)), guard)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no guard at"):
        from_pretrained(tmp_path / "empty")
