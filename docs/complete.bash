# Completion of settings, groups and their options in bash:    source docs/complete.bash
# Then `python -m train sae=<Tab>`; the stage itself is asked, so its settings are those of conf/.
_thresher_complete() {
    local words stage line
    read -ra words <<<"${COMP_LINE:0:COMP_POINT}"
    [[ ${words[1]} == -m && ${words[2]} =~ ^(harvest|train|evaluate|benchmarks)(\.[a-z_]+)*$ ]] || return
    stage=${words[2]}
    line=${COMP_LINE:0:COMP_POINT}
    COMPREPLY=($(compgen -o nospace -W "$(COMP_LINE="$stage ${line#*-m "$stage" }" "${words[0]}" -m "$stage" -sc query=bash 2>/dev/null)" -- "${line##* }"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=/}
complete -o nospace -o default -F _thresher_complete python .venv/bin/python
