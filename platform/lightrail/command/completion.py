"""``lightrail completion``: a script for each shell, which asks ``lightrail complete`` at every TAB."""

from __future__ import annotations

from collections.abc import Sequence

from lightrail.errors import ConfigurationError

__all__ = ["SCRIPTS", "main"]

# bash takes '=' and ':' for the end of a word, and replaces only what follows the last of them.
_BASH = """\
_lightrail_complete() {
    local line="${COMP_LINE:0:COMP_POINT}" word head candidate
    local -a words
    read -ra words <<< "$line"
    [[ "$line" == *[[:space:]] ]] && words+=("")
    word="${words[${#words[@]}-1]}"
    head="${word%"${word##*[=:]}"}"
    COMPREPLY=()
    while IFS= read -r candidate; do
        COMPREPLY+=("${candidate#"$head"}")
    done < <(lightrail complete -- "${words[@]}" 2>/dev/null)
    if [[ ${#COMPREPLY[@]} -eq 1 && "${COMPREPLY[0]}" == *[=.] ]]; then compopt -o nospace; fi
}
complete -F _lightrail_complete train generate lightrail
"""

_ZSH = """\
#compdef train generate lightrail
_lightrail_complete() {
    local -a found open closed
    found=("${(@f)$(lightrail complete -- "${(@)words[1,CURRENT]}" 2>/dev/null)}")
    found=(${found:#})
    open=(${(M)found:#*[=.]})
    closed=(${found:#*[=.]})
    (( $#open )) && compadd -Q -S '' -- $open
    (( $#closed )) && compadd -Q -- $closed
}
compdef _lightrail_complete train generate lightrail
"""

_FISH = """\
function __lightrail_complete
    lightrail complete -- (commandline -opc) (commandline -ct) 2>/dev/null
end
for name in train generate lightrail
    complete -c $name -f -a '(__lightrail_complete)'
end
"""

SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def main(arguments: Sequence[str]) -> int:
    """Prints the script of one shell.

    Args:
        arguments: The name of the shell.
    """
    if len(arguments) != 1 or arguments[0] not in SCRIPTS:
        raise ConfigurationError(
            "completion needs the name of a shell",
            found=" ".join(arguments) or "nothing",
            allowed=", ".join(SCRIPTS),
            remedy='In bash or zsh: eval "$(lightrail completion bash)"; in fish: lightrail completion fish | source',
        )
    print(SCRIPTS[arguments[0]], end="")
    return 0
