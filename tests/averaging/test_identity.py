"""Identities: a key file is ours and libp2p's alike, what is signed is hivemind's, and words can not be shifted."""

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as curve_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hivemind.p2p import P2P, PeerID
from hivemind.utils import crypto
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from averaging.dht import open_identity, start_dht
from averaging.identity import (
    LONGEST_KEY,
    is_signed,
    open_key,
    peer_id_of,
    public_bytes,
    read_key,
    sign,
    write_key,
)
from averaging.membership import bans_words, enrolment_words, experiment_words
from proto.coordinator_pb2 import EnrolRequest
from proto.identity_pb2 import PrivateKey
from training.errors import BadInput

plain = settings(derandomize=True, deadline=None, max_examples=60)
ED25519 = Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a key that covey made."""
    path = tmp_path_factory.mktemp("identity") / "identity.key"
    open_key(path)
    return path


@pytest.fixture(scope="module")
def theirs() -> crypto.RSAPrivateKey:
    """hivemind's own."""
    return crypto.RSAPrivateKey()


def test_a_new_key_is_for_its_owner_only_and_is_the_same_next_time(path: Path) -> None:
    before = path.read_bytes()
    assert public_bytes(open_key(path)) == public_bytes(read_key(path))
    assert path.read_bytes() == before
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_hivemind_reads_our_key_file_as_the_same_peer(path: Path) -> None:
    assert PeerID.from_identity(path.read_bytes()).to_base58() == peer_id_of(public_bytes(read_key(path)))
    assert open_identity(path).get_public_key().to_bytes() == public_bytes(read_key(path))


def test_libp2p_itself_gives_our_key_that_peer_id(path: Path) -> None:
    dht = start_dht(identity_path=path, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    try:
        assert str(dht.peer_id) == peer_id_of(public_bytes(read_key(path)))
    finally:
        dht.shutdown()


def test_we_read_a_key_file_of_hiveminds_and_write_it_the_same_to_the_byte(tmp_path: Path) -> None:
    path, copy = tmp_path / "theirs.key", tmp_path / "copy.key"
    P2P.generate_identity(str(path))
    write_key(copy, read_key(path))
    assert peer_id_of(public_bytes(read_key(path))) == PeerID.from_identity(path.read_bytes()).to_base58()
    assert PeerID.from_identity(copy.read_bytes()) == PeerID.from_identity(path.read_bytes())
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600


@pytest.mark.parametrize("content", [
    b"", b"\xff\xff\xff", b"-----BEGIN RSA PRIVATE KEY-----\n", PrivateKey(key_type=0, data=b"").SerializeToString(),
    PrivateKey(key_type=0, data=b"x" * 300).SerializeToString(),
    PrivateKey(key_type=1, data=Ed25519PrivateKey.generate().private_bytes_raw()).SerializeToString(),
    PrivateKey(key_type=0, data=curve_key(SECP256R1()).private_bytes(
        Encoding.DER, PrivateFormat.PKCS8, NoEncryption())).SerializeToString()])
def test_a_file_that_holds_no_rsa_key_is_bad_input_and_stays_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"identity\.key") as refused:
        open_key(path)
    assert "\n" not in str(refused.value)
    assert path.read_bytes() == content


def test_a_key_cut_short_or_a_folder_in_its_place_is_bad_input(path: Path, tmp_path: Path) -> None:
    (tmp_path / "short.key").write_bytes(path.read_bytes()[:-1])
    for wrong in (tmp_path / "short.key", tmp_path):
        with pytest.raises(BadInput, match="expected a key that covey or libp2p wrote there"):
            read_key(wrong)


def test_a_key_is_replaced_whole_though_a_draft_was_left(path: Path, tmp_path: Path) -> None:
    target, draft = tmp_path / "identity.key", tmp_path / "identity.tmp"
    draft.write_bytes(b"half")
    draft.chmod(0o644)
    write_key(target, read_key(path))
    assert public_bytes(read_key(target)) == public_bytes(read_key(path))
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert not draft.exists()


def test_what_we_sign_hivemind_believes_and_the_other_way_round(path: Path, theirs: crypto.RSAPrivateKey) -> None:
    key = read_key(path)
    assert crypto.RSAPublicKey.from_bytes(public_bytes(key)).verify(b"words", sign(key, b"words"))
    assert not crypto.RSAPublicKey.from_bytes(public_bytes(key)).verify(b"other words", sign(key, b"words"))
    public = theirs.get_public_key().to_bytes()
    assert is_signed(public, b"words", theirs.sign(b"words"))
    assert not is_signed(public, b"other words", theirs.sign(b"words"))


def test_forgeries_are_no_signatures(path: Path, theirs: crypto.RSAPrivateKey) -> None:
    key: RSAPrivateKey = read_key(path)
    public, good = public_bytes(key), sign(key, b"words")
    assert is_signed(public, b"words", good)
    altered = b"A" * 8 + good[8:] if not good.startswith(b"A" * 8) else b"B" * 8 + good[8:]
    for wrong in (altered, b"", good[:-8], b"\xff not base64", b"!" * 344, theirs.sign(b"words")):
        assert not is_signed(public, b"words", wrong)


@pytest.mark.parametrize("public", [b"", b"ssh-rsa", b"ssh-rsa AAAA", b"\xff" * 50, b"x" * 10**6, ED25519])
def test_what_is_no_rsa_key_has_signed_nothing_and_has_no_peer_id(path: Path, public: bytes) -> None:
    assert not is_signed(public, b"words", sign(read_key(path), b"words"))
    with pytest.raises(ValueError, match=r"."):
        peer_id_of(public)


def test_a_key_with_more_behind_it_than_any_key_has_is_none(path: Path) -> None:
    public = public_bytes(read_key(path))
    padded = public + b" " + b"x" * (LONGEST_KEY - len(public) - 1)
    assert peer_id_of(padded) == peer_id_of(public)  # OpenSSH allows a comment there
    with pytest.raises(ValueError, match=r"."):
        peer_id_of(padded + b"x")


texts, blobs = st.text(max_size=12), st.binary(max_size=12)
requests = st.builds(EnrolRequest, run_id=texts, name=texts, version=texts, invite=texts, public_key=blobs,
                     time=st.floats(allow_nan=False, width=32))


@plain
@given(requests, requests)
def test_two_requests_for_enrolment_are_never_signed_alike(one: EnrolRequest, other: EnrolRequest) -> None:
    assume(one != other)
    assert enrolment_words(one) != enrolment_words(other)


@plain
@given(texts, texts, st.integers(0, 12))
def test_letters_moved_from_one_field_to_the_next_change_what_is_signed(name: str, version: str, cut: int) -> None:
    together = name + version
    assume(together[:cut] != name)
    one = EnrolRequest(run_id="r", name=name, version=version)
    assert enrolment_words(one) != enrolment_words(EnrolRequest(run_id="r", name=together[:cut],
                                                               version=together[cut:]))


@plain
@given(requests, texts, blobs)
def test_no_words_of_one_kind_are_words_of_another(request_: EnrolRequest, run_id: str, data: bytes) -> None:
    assert len({enrolment_words(request_), experiment_words(run_id, data), bans_words(data)}) == 3


@plain
@given(texts, blobs, st.integers(0, 24))
def test_an_experiment_is_signed_for_one_run(run_id: str, document: bytes, cut: int) -> None:
    together = run_id.encode() + document
    try:
        other = together[:cut].decode()
    except UnicodeDecodeError:
        return
    assume(other != run_id)
    assert experiment_words(run_id, document) != experiment_words(other, together[cut:])


def test_all_that_a_volunteer_says_is_signed() -> None:
    said = EnrolRequest(run_id="r", name="n", version="v", invite="i", public_key=b"k", time=1.0)
    changes = {"run_id": "x", "name": "x", "version": "x", "invite": "x", "public_key": b"x", "time": 2.0}
    assert changes.keys() == {field.name for field in EnrolRequest.DESCRIPTOR.fields} - {"signature"}
    for field, value in changes.items():
        other = EnrolRequest.FromString(said.SerializeToString())
        setattr(other, field, value)
        assert enrolment_words(other) != enrolment_words(said)
