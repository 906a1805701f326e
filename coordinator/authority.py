"""The experiment's authority: it lets volunteers in, and puts them out. Nothing here waits for the network.

Its key is the root of all that members believe: it signs the experiment, their tokens and the list of bans. Who has the
state directory has the authority; who has an invite can make any number of members until it ends.
"""

import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import repeat
from pathlib import Path

from averaging.authorisation import issue_token
from averaging.bans import BanFile
from averaging.dht import open_identity
from averaging.identity import is_signed, peer_id_of
from averaging.membership import bans_words, contribution_words, enrolment_words, experiment_words
from coordinator.credit_ledger import CreditLedger
from coordinator.facts import BanFact, Facts
from coordinator.ledger import Ledger
from coordinator.members import Invite, Member
from proto.authority_pb2 import Bans, SignedBans
from proto.coordinator_pb2 import EnrolRequest
from training.errors import BadInput

DAY_SECONDS = 86400.0
TOKEN_SECONDS = 30 * DAY_SECONDS  # for most of that a coordinator may be away
BANS_SECONDS = 30 * DAY_SECONDS   # that the DHT keeps a list; it is signed anew each day
CLOCK_SECONDS = 60.0          # more than that off, and hivemind's DHT refuses a peer's requests
FIRST_INVITE = "first"        # the label of the one that comes with a new state directory
NAME_LETTERS = 64
CODE_BYTES = 16
LATEST = 253402300800.0       # Unix seconds: the year 10000, of which no calendar here knows
log = logging.getLogger("covey.coordinator")


class Denied(Exception):
    """A volunteer is not let in; worded for it, as found, expected, mend. `reason`: for metrics, one of few."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Grant:
    """What makes a peer a member until `expires`, Unix seconds."""

    name: str
    token: bytes
    expires: float


class Authority:
    """Of the run in the state directory `folder`. `is_open`: anyone may enrol, without an invite.

    `failures` counts who was not let in, by reason. `clock` gives Unix seconds. Raises BadInput for files that are none
    of ours.
    """

    def __init__(self, folder: Path, run_id: str, *, is_open: bool, token_seconds: float = TOKEN_SECONDS,
                 clock: Callable[[], float] = time.time) -> None:
        self._key = open_identity(folder / "authority.key")
        self.public_key: bytes = self._key.get_public_key().to_bytes()
        self.failures: Counter[str] = Counter()
        self.ledger = Ledger(folder / "ledger.sqlite")
        self.credits = CreditLedger(folder / "credits.sqlite")
        self.ban_file = BanFile(folder / "bans", self.public_key, run_id)
        self.run_id, self.is_open, self._token_seconds, self._clock = run_id, is_open, token_seconds, clock
        if not self.ledger.invites():
            self.create_invite(FIRST_INVITE)
        self.tend_bans()  # it may have ended between an order and its signature

    # -- letting in --

    def enrol(self, request: EnrolRequest) -> Grant:
        """Let the volunteer in, for the first time or again. Raises Denied, which is counted."""
        try:
            return self._enrol(request)
        except Denied as denied:
            self.failures[denied.reason] += 1
            raise

    def _enrol(self, request: EnrolRequest) -> Grant:
        peer_id, now = self._check(request), self._clock()
        if peer_id in self.ban_file.newest().peer_ids:
            ban = self.ledger.facts().bans.get(peer_id)
            reason = f" ({ban.reason})" if ban and ban.reason else ""
            raise Denied("banned", f"this volunteer is banned{reason}; expected one who is not. Ask the operator.")
        if self.ledger.is_member(peer_id):
            name = self.ledger.renew(peer_id, request.name, now)
        else:
            name = self._admit(peer_id, request, now)
        expires = now + self._token_seconds
        return Grant(name, self.issue(bytes(request.public_key), name, expires), expires)

    def _check(self, request: EnrolRequest) -> str:
        """Who asks: the holder of the key has signed this, a moment ago."""
        off = self._clock() - request.time
        if not abs(off) <= CLOCK_SECONDS:
            raise Denied("clock", f"a clock that is {abs(off):.0f} s {'slow' if off > 0 else 'fast'}; expected at most "
                         f"{CLOCK_SECONDS:.0f} s. Set this machine's clock, by NTP for instance.")
        try:
            peer_id = peer_id_of(request.public_key)
        except ValueError as error:
            raise Denied("key", f"a public key that is none ({error}); expected an RSA key. Update covey.") from None
        if not is_signed(request.public_key, enrolment_words(request), request.signature):
            raise Denied("signature", "an enrolment that its key has not signed; expected its signature. Update covey.")
        return peer_id

    def _admit(self, peer_id: str, request: EnrolRequest, now: float) -> str:
        code, mend = request.invite, "Ask the operator for a new link."
        if not self.is_open:
            invite = self.ledger.find_invite(code) if code else None
            if invite is None or invite.code != code:
                raise Denied("invite", f"{'an unknown' if code else 'no'} invite; expected one of the operator's, in "
                             f"the link. {mend}")
            if refusal := invite.refusal(now):
                raise Denied("invite", f"an invite that is {refusal}; expected one that is good. {mend}")
        try:
            name = self.ledger.enrol(peer_id, request.name, request.public_key, "" if self.is_open else code, now)
        except ValueError as error:  # another one came first
            raise Denied("invite", f"{error}; expected one that is good. {mend}") from None
        log.info("%r enrolled (%s)", name, peer_id)
        return name

    def issue(self, public_key: bytes, name: str, expires: float) -> bytes:
        """A token for the holder of the key; ValueError if it is none."""
        return issue_token(self._key, run_id=self.run_id, public_key=public_key, name=name,
                           expires=datetime.fromtimestamp(expires, UTC))

    def sign_experiment(self, document: bytes) -> bytes:
        """The authority's signature of it."""
        return self.sign(experiment_words(self.run_id, document))

    def sign_contribution(self, contribution: bytes) -> bytes:
        """The authority's signature of it."""
        return self.sign(contribution_words(contribution))

    def sign(self, words: bytes) -> bytes:
        """By the authority's key."""
        return bytes(self._key.sign(words))

    def close(self) -> None:
        """Let go of the ledgers."""
        self.ledger.close()
        self.credits.close()

    # -- invites --

    def create_invite(self, label: str, uses: int | None = None, expires: float | None = None) -> Invite:
        """A new one. Raises BadInput if there is one with this label, or if it could never be used."""
        now = self._clock()
        if not 1 <= len(label) <= NAME_LETTERS or not label.isprintable():
            raise BadInput(f"label {label[:NAME_LETTERS]!r}", expected="1 to 64 printable characters",
                           mend="Choose another.")
        if uses == 0 or (expires is not None and not now < expires < LATEST):
            raise BadInput("an invite that nobody could use", expected="at least one use and an end to come",
                           mend="Change --uses or --expires.")
        invite = Invite(secrets.token_urlsafe(CODE_BYTES), label, now, expires, uses, False, 0)
        if not self.ledger.add_invite(invite):
            raise BadInput(f"a second invite with the label {label!r}", expected="a label of its own",
                           mend="Choose another, or revoke that one.")
        return invite

    def revoke_invite(self, code_or_label: str) -> Invite:
        """Who has enrolled with it stays. Raises BadInput if there is none."""
        if (invite := self.ledger.find_invite(code_or_label)) is None:
            raise BadInput(f"invite {code_or_label[:NAME_LETTERS]!r}", expected="the code or label of an invite",
                           mend="`covey invite list` shows them.")
        self.ledger.revoke_invite(invite.code)
        return next(found for found in self.ledger.invites() if found.code == invite.code)

    @property
    def invite_to_show(self) -> str | None:
        """The code to print with the link: of the oldest that can be used any number of times; None: there is none."""
        now = self._clock()
        return next((invite.code for invite in self.ledger.invites()
                     if invite.refusal(now) is None and invite.uses_left is None), None)

    # -- bans --

    def ban(self, peer: str, reason: str, *, lift: bool = False) -> Member:
        """Ban the member with this peer id or name, or lift its ban. Raises BadInput if nobody is known by that."""
        if (member := self.ledger.find_member(peer)) is None:
            raise BadInput(f"volunteer {peer[:NAME_LETTERS]!r}", expected="the name or peer id of a member",
                           mend="`covey status LINK` shows them.")
        if lift:
            self.ledger.lift(member.peer_id, self._clock())
        else:
            self.ledger.ban(member.peer_id, reason, self._clock())
        self.sign_bans()
        log.info("%r (%s): %s", member.name, member.peer_id, "ban lifted" if lift else f"banned: {reason}")
        return next(found for found in self.ledger.members() if found.peer_id == member.peer_id)

    def tend_bans(self) -> bool:
        """To be called now and then: take in what another coordinator has ordered, and sign the list anew if it does
        not say all that is known, or is a day old: the DHT forgets one that expires. Whether it was signed."""
        newest, now = self.ban_file.newest(), self._clock()
        heard = Facts(bans=_orders(newest.bans), serial=newest.bans.serial)
        self.ledger.learn(heard)
        is_old = newest.signed and newest.bans.expires - now < BANS_SECONDS - DAY_SECONDS
        if not is_old and _without_reasons(self.ledger.facts().bans) == heard.bans:
            return False
        self.sign_bans()
        return True

    def sign_bans(self) -> None:
        """Sign the list anew, into `ban_file`."""
        now = self._clock()
        serial = self.ledger.next_serial(now, self.ban_file.newest().bans.serial)
        orders = sorted(self.ledger.facts().bans.values(), key=lambda order: order.peer_id)
        banned, lifted = ([order for order in orders if order.banned is wanted] for wanted in (True, False))
        bans = Bans(run_id=self.run_id, serial=serial, expires=now + BANS_SECONDS,
                    peer_ids=[order.peer_id for order in banned], times=[order.time for order in banned],
                    lifted=[order.peer_id for order in lifted], lifted_times=[order.time for order in lifted])
        words = bans.SerializeToString()
        self.ban_file.offer(SignedBans(bans=words, signature=self.sign(bans_words(words))).SerializeToString())


def _orders(bans: Bans) -> dict[str, BanFact]:
    """What a list says, as the ledger keeps it; the reasons are not for all to read."""
    return {peer_id: BanFact(peer_id, time, banned, "") for peer_ids, times, banned in (
                (bans.peer_ids, bans.times, True), (bans.lifted, bans.lifted_times, False))
            for peer_id, time in zip(peer_ids, times or repeat(0.0), strict=False)}  # version 1 gave no times


def _without_reasons(bans: Mapping[str, BanFact]) -> dict[str, BanFact]:
    return {peer_id: replace(ban, reason="") for peer_id, ban in bans.items()}
