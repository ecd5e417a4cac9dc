"""`python -m flows.stack.register`: create the automations of infra/automations.yaml in Prefect.

Existing ones of the same name are updated, so it may be run again.
"""

import sys
from pathlib import Path

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events.schemas.automations import AutomationCore

FILE = Path("infra", "automations.yaml")


def main() -> int:
    """Create or update the automations on the server that PREFECT_API_URL names."""
    wanted = yaml.safe_load(FILE.read_text())["automations"]
    with get_client(sync_client=True) as client:
        for each in wanted:
            register(client, AutomationCore.model_validate(each))
    return 0


def register(client: SyncPrefectClient, automation: AutomationCore) -> None:
    """Create the automation, or update the one of the same name."""
    present = client.read_automations_by_name(automation.name)
    if present:
        client.update_automation(present[0].id, automation)
    else:
        client.create_automation(automation)


if __name__ == "__main__":
    sys.exit(main())
