//! `--change` of `import`: one Dockerfile instruction applied to an image's configuration.

use coracle_oci::ImageConfig;

use crate::EngineError;

/// Applies one instruction.
///
/// # Errors
/// It is not one of those that change a configuration, or it is not complete.
pub(crate) fn apply(config: &mut ImageConfig, change: &str) -> Result<(), EngineError> {
    let bad = |why: &str| {
        EngineError::Invalid {
        message: format!("cannot apply the change {change:?}: {why}"),
        hint: Some("a change is one of CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, ONBUILD, STOPSIGNAL, USER, VOLUME, WORKDIR".to_owned()),
    }
    };
    let (instruction, rest) =
        change.trim().split_once(char::is_whitespace).ok_or_else(|| bad("it has no value"))?;
    let rest = rest.trim();
    let run = &mut config.config;
    match instruction.to_ascii_uppercase().as_str() {
        "CMD" => run.cmd = Some(command(rest)),
        "ENTRYPOINT" => run.entrypoint = Some(command(rest)),
        "ENV" => {
            for (name, value) in pairs(rest).ok_or_else(|| bad("it has no value"))? {
                run.env.retain(|e| e.split('=').next() != Some(&name));
                run.env.push(format!("{name}={value}"));
            }
        }
        "LABEL" => run.labels.extend(pairs(rest).ok_or_else(|| bad("it has no value"))?),
        "EXPOSE" => {
            for port in rest.split_whitespace() {
                let port = if port.contains('/') { port.to_owned() } else { format!("{port}/tcp") };
                run.exposed_ports.insert(port, coracle_oci::json::Empty {});
            }
        }
        "VOLUME" => {
            for path in words(rest) {
                run.volumes.insert(path, coracle_oci::json::Empty {});
            }
        }
        "USER" => rest.clone_into(&mut run.user),
        "WORKDIR" => run.working_dir = crate::merge::clean_path(rest),
        "STOPSIGNAL" => rest.clone_into(&mut run.stop_signal),
        "ONBUILD" => run.on_build.push(rest.to_owned()),
        _ => return Err(bad("it is not an instruction that changes a configuration")),
    }
    Ok(())
}

/// A JSON list is taken as it is; anything else is given to the shell.
fn command(text: &str) -> Vec<String> {
    serde_json::from_str(text)
        .unwrap_or_else(|_shell_form| vec!["/bin/sh".to_owned(), "-c".to_owned(), text.to_owned()])
}

fn words(text: &str) -> Vec<String> {
    serde_json::from_str(text).unwrap_or_else(|_plain| text.split_whitespace().map(str::to_owned).collect())
}

/// `a=1 b="two words"`, or the old form `a one value`.
fn pairs(text: &str) -> Option<Vec<(String, String)>> {
    let first = text.split_whitespace().next()?;
    if !first.contains('=') {
        let (name, value) = text.split_once(char::is_whitespace)?;
        return Some(vec![(name.to_owned(), value.trim().to_owned())]);
    }
    split_quoted(text)
        .into_iter()
        .map(|word| word.split_once('=').map(|(n, v)| (n.to_owned(), v.to_owned())))
        .collect()
}

/// Splits at spaces outside of quotes, and removes the quotes.
fn split_quoted(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quote = None;
    let mut characters = text.chars();
    while let Some(c) = characters.next() {
        match (c, quote) {
            ('\\', _) => word.extend(characters.next()),
            (c, Some(q)) if c == q => quote = None,
            ('"' | '\'', None) => quote = Some(c),
            (c, None) if c.is_whitespace() => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
            }
            (c, _) => word.push(c),
        }
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(changes: &[&str]) -> ImageConfig {
        let mut config = ImageConfig::default();
        for change in changes {
            apply(&mut config, change).unwrap();
        }
        config
    }

    #[test]
    fn commands_are_lists_or_given_to_the_shell() {
        let config = changed(&[r#"CMD ["redis-server", "--port", "1"]"#, "ENTRYPOINT exec top -b"]).config;
        assert_eq!(config.cmd.unwrap(), ["redis-server", "--port", "1"]);
        assert_eq!(config.entrypoint.unwrap(), ["/bin/sh", "-c", "exec top -b"]);
    }

    #[test]
    fn variables_and_labels_may_be_quoted() {
        let config = changed(&["ENV A=1 B=\"two words\"", "env A=2", "LABEL x y z"]).config;
        assert_eq!(config.env, ["B=two words", "A=2"]);
        assert_eq!(config.labels["x"], "y z");
    }

    #[test]
    fn what_is_no_change_is_refused() {
        let mut config = ImageConfig::default();
        for bad in ["RUN true", "CMD", "ENV A"] {
            assert!(apply(&mut config, bad).is_err(), "{bad}");
        }
    }
}
