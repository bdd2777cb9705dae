//! A private registry on loopback: Debian's `docker-registry`, on a free port, for the life of a value.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{TaskError, io};
use crate::shell::{self, Background};

/// How long the registry may take to listen.
const START: Duration = Duration::from_secs(20);

/// A running registry; it ends when the value is dropped. Its files stay until their directory is removed.
#[derive(Debug)]
pub struct Registry {
    address: String,
    process: Background,
}

impl Registry {
    /// Starts a registry that keeps its files in `dir`.
    ///
    /// # Errors
    /// If the program is missing or does not come up.
    pub fn start(dir: &Path) -> Result<Self, TaskError> {
        let program = shell::find("docker-registry").ok_or_else(|| TaskError::Missing {
            what: "docker-registry".to_owned(),
            remedy: "apt-get install docker-registry".to_owned(),
        })?;
        fs::create_dir_all(dir).map_err(io("create", dir))?;
        let config = dir.join("config.yml");
        // Port 0: the kernel chooses, the registry logs its choice.
        let text = format!(
            "version: 0.1\nlog: {{level: info, formatter: json}}\nstorage: {{filesystem: {{rootdirectory: {}}}, \
             delete: {{enabled: true}}}}\nhttp: {{addr: \"127.0.0.1:0\", secret: loopback-only}}\n",
            serde_json::Value::from(dir.join("data").to_string_lossy())
        );
        fs::write(&config, text).map_err(io("write", &config))?;
        let mut command = shell::command(&program);
        command.arg("serve").arg(&config).env("OTEL_TRACES_EXPORTER", "none");
        let process = Background::start(&mut command)?;
        let address = process.wait_for_line("listening", START, listening_address)?;
        Ok(Self { address, process })
    }

    /// `127.0.0.1:<port>`.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The registry's process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Pushes an image of a layout; `to` is `name:tag`. Returns the reference to pull it by.
    ///
    /// # Errors
    /// If skopeo is missing or fails.
    pub fn push(&self, layout: &Path, name: &str, to: &str) -> Result<String, TaskError> {
        let reference = format!("{}/{to}", self.address);
        let mut command = shell::command("skopeo");
        command.args(["copy", "--quiet", "--insecure-policy", "--dest-tls-verify=false"]);
        command.arg(format!("oci:{}:{name}", layout.display())).arg(format!("docker://{reference}"));
        shell::stdout(&mut command)?;
        Ok(reference)
    }

    /// Where the registry keeps its blobs.
    #[must_use]
    pub fn data(dir: &Path) -> PathBuf {
        dir.join("data")
    }
}

/// The address in the registry's own log line.
fn listening_address(line: &str) -> Option<String> {
    let rest = line.split_once("listening on ")?.1;
    let end = rest.find(|c: char| !(c.is_ascii_digit() || c == '.' || c == ':'))?;
    rest.get(..end).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::listening_address;

    #[test]
    fn the_port_is_read_from_the_log() {
        let text =
            r#"{"go.version":"go1.19.8","level":"info","msg":"listening on 127.0.0.1:43075","time":"x"}"#;
        assert_eq!(listening_address(text).as_deref(), Some("127.0.0.1:43075"));
        let plain = r#"time="x" level=info msg="listening on 127.0.0.1:5000" go.version=go1.19.8"#;
        assert_eq!(listening_address(plain).as_deref(), Some("127.0.0.1:5000"));
        assert_eq!(listening_address("starting"), None);
    }
}
