"""Stand-ins for the tools that jobs are submitted with: they note what they were called with."""

import pathlib

import pytest

NOTE = """\
#!/usr/bin/env bash
printf '%s\\0' "${0##*/}" "$@" >>"$CALLS"
printf '\\n' >>"$CALLS"
echo "said by ${0##*/}"
exit "${STAND_IN_CODE:-0}"
"""


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Puts the named programs first into PATH; the function that is returned gives their calls so far."""
    folder, calls = tmp_path / 'bin', tmp_path / 'calls'
    folder.mkdir()
    monkeypatch.setenv('PATH', str(folder), prepend=':')
    monkeypatch.setenv('CALLS', str(calls))

    def put(*names: str, text: str = NOTE):
        for name in names:
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

        def made() -> list[list[str]]:
            return [call.split('\0') for call in calls.read_text().split('\0\n')[:-1]] if calls.exists() else []

        return made

    return put


@pytest.fixture
def here(tmp_path, monkeypatch) -> pathlib.Path:
    """The folder in which commands are given."""
    folder = tmp_path / 'here'
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder
