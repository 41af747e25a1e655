"""Who is alive, who is late: each process says every two seconds where it is, and hears the others.

jax notices a process that has died after 100 seconds and one that hangs never: collectives wait without end. Here a
peer that is silent, or that stays behind while others wait for it, ends the run with its name.
"""

import collections
import json
import logging
import os
import socket
import statistics
import threading
import time
from dataclasses import dataclass

from raddino_jax import hosts, logs

PERIOD = 2.0  # seconds between two beats
TELL_EVERY = 60.0  # seconds between two lines per host
ORDER = ("starting", "step", "data", "devices", "evaluation", "saving")  # what the loop does about one step
FINISHED = "finished"
LATER = "writing"  # reports: counted anew, after all steps


@dataclass
class Peer:
    """What is known of a process. beat: its newest words; heard, moved: when it last spoke, and last got further."""

    beat: dict
    heard: float
    moved: float

    @property
    def name(self) -> str:
        return f"host {self.beat['process']} ({self.beat['name']}, process id {self.beat['pid']})"

    @property
    def place(self) -> tuple[bool, int, int]:
        """How far it is."""
        doing = self.beat["doing"]
        return doing == LATER, self.beat["step"], len(ORDER) if doing == LATER else ORDER.index(doing)


class Pulse:
    """Where this process is in its run. Called by the loop as pulse(step, doing) at each change."""

    def __init__(self):
        self.step, self.doing, self.changed = 0, "starting", time.monotonic()
        self.spent: collections.Counter = collections.Counter()
        self.own: collections.deque = collections.deque(maxlen=50)  # seconds of a step that were this process's alone
        self.lengths: collections.deque = collections.deque(maxlen=50)
        self.began: float | None = None

    def __call__(self, step: int, doing: str) -> None:
        if doing not in (*ORDER, LATER, FINISHED):
            raise ValueError(f"{doing!r} is no word that the other processes know")
        now = time.monotonic()
        self.spent[self.doing] += now - self.changed
        self.step, self.doing, self.changed = step, doing, now
        if doing == "step":
            self._note(now)

    def _note(self, now: float) -> None:
        """A step begins, so one has ended."""
        if self.began is not None:
            apart = self.spent["evaluation"] + self.spent["saving"]
            seconds = now - self.began - apart
            said = outlier(seconds, self.lengths)
            if said:
                data = self.spent["data"]
                logs.say(f"step {self.step - 1} took {seconds:.2f} s: {said}; {data:.2f} s of it for data")
            self.lengths.append(seconds)
            self.own.append(self.spent["data"])
        self.began = now
        self.spent.clear()

    def words(self, number: int) -> dict:
        """What the others hear."""
        return {
            "process": hosts.index(), "name": socket.gethostname(), "pid": os.getpid(), "number": number,
            "step": self.step, "doing": self.doing, "step_seconds": _median(self.lengths), "own": _median(self.own),
        }


def _median(values) -> float:
    return statistics.median(list(values)) if values else 0.0


def outlier(seconds: float, before) -> str:
    """What is odd about a step of this length after the lengths before it; "" where nothing is."""
    if len(before) < 10:
        return ""
    middle = statistics.median(before)
    return f"the median is {middle:.2f} s" if seconds > 3 * middle and seconds > middle + 0.5 else ""


def verdict(peers: list[Peer], now: float, silence: float, hang: float) -> str:
    """Why the run cannot go on, "" while it can.

    silence: seconds without a beat after which a peer is taken for dead or frozen. hang: seconds that a peer may stay
    behind the furthest one.
    """
    going = [p for p in peers if p.beat["doing"] != FINISHED]
    for peer in going:
        if now - peer.heard > silence:
            last = peer.beat["step"]
            return f"{peer.name} has not been heard of for {now - peer.heard:.0f} s; its last step was {last}"
    furthest = max(going, key=lambda p: p.place, default=None)
    for peer in going:
        if peer.place < furthest.place and now - peer.moved > hang:
            return (
                f"{peer.name} hangs: at step {peer.beat['step']} ({peer.beat['doing']}) for {now - peer.moved:.0f} s "
                f"while others wait at step {furthest.beat['step']} ({furthest.beat['doing']})"
            )
    return ""


def stragglers(beats: list[dict]) -> list[str]:
    """A line for each process whose films take so long that the others wait for it."""
    lines = []
    for beat in beats:
        others = _median([b["own"] for b in beats if b is not beat])
        if beat["own"] > 0.2 * beat["step_seconds"] and beat["own"] > 2 * others + 0.01:
            lines.append(
                f"host {beat['process']} ({beat['name']}) holds the others up: {beat['own']:.2f} s a step for data, "
                f"the others {others:.2f} s"
            )
    return lines


class Heartbeat:
    """Two threads: one talks to the store, the other ends this process when a peer, or the store, is silent."""

    def __init__(self, pulse: Pulse, silence: float, hang: float, tell_every: float = TELL_EVERY):
        self.pulse, self.silence, self.hang, self.tell_every = pulse, silence, hang, tell_every
        self.peers: dict[int, Peer] = {}
        self.verdict = ""  # what any process found, the first one's words
        self.answered = self.told = time.monotonic()
        self.over = threading.Event()
        for work in (self._talk, self._judge):
            threading.Thread(target=work, daemon=True).start()

    def _talk(self) -> None:
        number, store = 0, hosts.client()
        while not self.over.is_set():
            number += 1
            try:
                words = json.dumps(self.pulse.words(number))
                store.key_value_set(f"raddino/beat/{hosts.index()}", words, allow_overwrite=True)
                for _, text in store.key_value_dir_get("raddino/beat/"):
                    self._hear(json.loads(text))
                self.verdict = "".join(text for _, text in store.key_value_dir_get("raddino/verdict/"))
                self.answered = time.monotonic()
            except Exception as error:  # whatever the store meets; its silence is judged by the other thread
                logging.debug("the store does not answer: %s", error)
            self.over.wait(PERIOD)

    def _hear(self, beat: dict) -> None:
        now, old = time.monotonic(), self.peers.get(beat["process"])
        if old is None or old.beat["number"] != beat["number"]:
            same = old is not None and (old.beat["step"], old.beat["doing"]) == (beat["step"], beat["doing"])
            self.peers[beat["process"]] = Peer(beat, now, old.moved if same else now)

    def _judge(self) -> None:
        before = time.monotonic()
        while not self.over.wait(PERIOD / 2):
            before = self._forgive(before)
            found = self.verdict or self.fault()
            if found and not self.over.is_set():
                logs.say(
                    f"raddino_jax: {found}. This process ends too; start all of them again to go on from the newest "
                    "checkpoint", each=True,
                )
                self._pronounce(found)
                hosts.quit_now(1)
            if time.monotonic() - self.told > self.tell_every:
                self.told = time.monotonic()
                self._tell()

    def _forgive(self, before: float) -> float:
        """Now, after giving the peers back the time in which this process itself stood still (a machine suspended)."""
        now = time.monotonic()
        lost = now - before - PERIOD
        if lost > PERIOD:
            self.answered = min(self.answered + lost, now)
            for peer in list(self.peers.values()):
                peer.heard, peer.moved = min(peer.heard + lost, now), min(peer.moved + lost, now)
        return now

    def fault(self) -> str:
        """Why this process has to end because of another one; "" while all is well."""
        now, me = time.monotonic(), hosts.index()
        if now - self.answered > self.silence and me != 0:
            name = self.peers[0].name if 0 in self.peers else "host 0"
            return f"{name}, which coordinates the run, has not answered for {now - self.answered:.0f} s"
        others = [peer for i, peer in list(self.peers.items()) if i != me]
        return verdict([Peer(self.pulse.words(0), now, now), *others], now, self.silence, self.hang)

    def _pronounce(self, found: str) -> None:
        """Tell the others; the coordinator stays until they had time to hear it, for without it they are cut off."""
        telling = threading.Thread(target=_set_once, args=("raddino/verdict/0", found), daemon=True)
        telling.start()
        telling.join(PERIOD)
        if hosts.index() == 0:
            time.sleep(2 * PERIOD)

    def _tell(self) -> None:
        beats = [peer.beat for _, peer in sorted(self.peers.items())]
        for beat in beats:
            logs.say(
                f"host {beat['process']} ({beat['name']}): step {beat['step']}, {beat['doing']}, "
                f"{beat['step_seconds']:.2f} s a step, {beat['own']:.2f} s of it for data"
            )
        for line in stragglers(beats):
            logs.say(line)

    def leave(self) -> None:
        """Fall silent once all have finished: silence before that would be taken for death."""
        self.pulse(self.pulse.step, FINISHED)
        hosts.gather(FINISHED, True)
        self.over.set()

    def give_up(self, why: str, code: int) -> None:
        """End this process for a fault of its own, and tell the others."""
        self.over.set()
        self._pronounce(f"host {hosts.index()} ({socket.gethostname()}) has ended: {why}")
        hosts.quit_now(code)

    def suspect(self) -> None:
        """Wait for a verdict: a peer's death breaks a collective here at once, only time tells whose fault it was.

        Returns where nobody is to blame; otherwise the process ends meanwhile.
        """
        time.sleep(self.silence + 3 * PERIOD)


def _set_once(key: str, text: str) -> None:
    try:
        hosts.client().key_value_set(key, text)
    except Exception as error:  # said already, or nobody there to hear it
        logging.debug("not told: %s", error)
