"""What the status page looks like, to be looked at; `status_page.png` is the one in docs/.

    PYTHONPATH=.:tests python tests/coordinator/page/screenshots.py FOLDER
"""

import sys
from pathlib import Path

from chromium import DRAWN, chromium_tab
from invented import TARGET, Site, credited, kept, lively

from coordinator.archive import Archive
from coordinator.credit_ledger import Leaderboard
from coordinator.swarm import SwarmState
from coordinator.view import About

ABOUT = About(run_id="resnet50-swav-0123456789ab", link="covey://swarm.example.org:31338/resnet50-swav-0123456789ab",
              version="0.1.0", target_batch_size=TARGET, target_group_size=4, averaged="gradients")
LOOKS = {"light": (1200, False, False), "dark": (1200, True, False), "phone": (360, False, True),
         "phone_dark": (360, True, True)}


def main(folder: Path) -> None:
    """Write a PNG for every look, and one of an empty swarm."""
    state, history = lively()
    site = Site(ABOUT, state, history, kept(state.time), credited())
    with site.served(), chromium_tab() as tab:
        for name, (width, dark, phone) in LOOKS.items():
            tab.look(width, 800, dark=dark, phone=phone)
            tab.open(site.url)
            tab.wait(DRAWN, "the charts")
            tab.screenshot(folder / f"{name}.png", whole=True)
        tab.look(1200, 1055)
        tab.open(site.url)
        tab.wait(DRAWN, "the charts")
        tab.screenshot(folder / "status_page.png")
        site.archive, site.leaderboard = Archive(), Leaderboard()
        site.show(SwarmState(time=site.state.time, since=site.state.time))
        tab.open(site.url)
        tab.wait("document.querySelector('#chart-loss figcaption')?.innerText", "the empty page")
        tab.screenshot(folder / "empty.png", whole=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
