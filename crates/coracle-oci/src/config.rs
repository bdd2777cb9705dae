//! The configuration of an image: what to run in it and how it was made.
//!
//! The digest of these bytes is the image's ID, so callers keep the bytes as they came; this is the part of them
//! that Coracle understands, unknown fields are left in the bytes. Lists may be `null` and fields may be missing.
//! Everything in it is data from outside: no value here names a program that runs on the host.
//! Source: OCI image-spec 1.1 `config.md`; Docker's image specification 1.3 (healthcheck, shell, on-build).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::digest::DiffId;
use crate::error::OciError;
use crate::json::{self, Empty};
use crate::manifest::{LAYERS_MAX, Manifest};
use crate::platform::Platform;

/// Bytes of an image configuration.
pub const CONFIG_BYTES_MAX: usize = 8 << 20;

const CONFIG: &str = "the image configuration";

/// An image's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    /// When it was made, RFC 3339, or empty.
    #[serde(skip_serializing_if = "String::is_empty", deserialize_with = "json::nullable")]
    pub created: String,
    /// Who made it.
    #[serde(skip_serializing_if = "String::is_empty", deserialize_with = "json::nullable")]
    pub author: String,
    /// What `import --message` and `commit --message` say.
    #[serde(skip_serializing_if = "String::is_empty", deserialize_with = "json::nullable")]
    pub comment: String,
    /// `amd64`, …
    #[serde(deserialize_with = "json::nullable")]
    pub architecture: String,
    /// `v7`, or empty.
    #[serde(skip_serializing_if = "String::is_empty", deserialize_with = "json::nullable")]
    pub variant: String,
    /// `linux`.
    #[serde(deserialize_with = "json::nullable")]
    pub os: String,
    /// Windows only.
    #[serde(
        rename = "os.version",
        skip_serializing_if = "String::is_empty",
        deserialize_with = "json::nullable"
    )]
    pub os_version: String,
    /// The version of Docker that made it, or empty.
    #[serde(skip_serializing_if = "String::is_empty", deserialize_with = "json::nullable")]
    pub docker_version: String,
    /// What to run.
    #[serde(deserialize_with = "json::nullable")]
    pub config: RunConfig,
    /// The layers, lowest first.
    #[serde(deserialize_with = "json::nullable")]
    pub rootfs: RootFs,
    /// How it was made, oldest first; more entries than layers.
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "json::nullable")]
    pub history: Vec<HistoryEntry>,
}

/// The layers of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RootFs {
    /// Always `layers`.
    #[serde(rename = "type", deserialize_with = "json::nullable")]
    pub kind: String,
    /// Digests of the uncompressed layers, lowest first.
    #[serde(deserialize_with = "json::nullable")]
    pub diff_ids: Vec<DiffId>,
}

impl Default for RootFs {
    fn default() -> Self {
        Self { kind: "layers".to_owned(), diff_ids: Vec::new() }
    }
}

/// What to run in a container of the image, if the user does not say otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RunConfig {
    /// Docker's leftover of the container it was made from.
    #[serde(skip_serializing_if = "String::is_empty", deserialize_with = "json::nullable")]
    pub hostname: String,
    /// Docker's leftover of the container it was made from.
    #[serde(skip_serializing_if = "String::is_empty", deserialize_with = "json::nullable")]
    pub domainname: String,
    /// `user`, `uid`, `user:group`, or empty for root.
    #[serde(skip_serializing_if = "String::is_empty", deserialize_with = "json::nullable")]
    pub user: String,
    /// `80/tcp`, …
    #[serde(skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "json::nullable")]
    pub exposed_ports: BTreeMap<String, Empty>,
    /// `KEY=value`, in order.
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "json::nullable")]
    pub env: Vec<String>,
    /// What always comes first on the command line. `None` and an empty list are different things to `inspect`.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "json::words")]
    pub entrypoint: Option<Vec<String>>,
    /// The command, or the arguments of the entrypoint.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "json::words")]
    pub cmd: Option<Vec<String>>,
    /// Whether the command is one escaped string (Windows).
    #[serde(skip_serializing_if = "std::ops::Not::not", deserialize_with = "json::nullable")]
    pub args_escaped: bool,
    /// Paths that get a volume of their own.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "json::nullable")]
    pub volumes: BTreeMap<String, Empty>,
    /// Where the command starts, or empty for `/`.
    #[serde(skip_serializing_if = "String::is_empty", deserialize_with = "json::nullable")]
    pub working_dir: String,
    /// Labels.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "json::nullable")]
    pub labels: BTreeMap<String, String>,
    /// The signal that asks it to stop: `SIGTERM`, `15`, or empty.
    #[serde(skip_serializing_if = "String::is_empty", deserialize_with = "json::nullable")]
    pub stop_signal: String,
    /// Seconds to wait after it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_timeout: Option<i64>,
    /// How to see whether it works.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub healthcheck: Option<Healthcheck>,
    /// The shell of the shell form of instructions.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "json::words")]
    pub shell: Option<Vec<String>>,
    /// Instructions for builds that start from it.
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "json::nullable")]
    pub on_build: Vec<String>,
}

/// How to see whether a container works. Durations are nanoseconds; 0 means "as inherited".
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Healthcheck {
    /// Empty: inherited. `["NONE"]`: off. `["CMD", …]`, `["CMD-SHELL", text]`.
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "json::nullable")]
    pub test: Vec<String>,
    /// Between two checks.
    #[serde(skip_serializing_if = "is_zero", deserialize_with = "json::nullable")]
    pub interval: i64,
    /// For one check.
    #[serde(skip_serializing_if = "is_zero", deserialize_with = "json::nullable")]
    pub timeout: i64,
    /// During which failures do not count.
    #[serde(skip_serializing_if = "is_zero", deserialize_with = "json::nullable")]
    pub start_period: i64,
    /// Between two checks during the start period.
    #[serde(skip_serializing_if = "is_zero", deserialize_with = "json::nullable")]
    pub start_interval: i64,
    /// Failures in a row that make it unhealthy.
    #[serde(skip_serializing_if = "is_zero", deserialize_with = "json::nullable")]
    pub retries: i64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
fn is_zero(n: &i64) -> bool {
    *n == 0
}

/// One step of how an image was made.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct HistoryEntry {
    /// When, RFC 3339, or empty.
    #[serde(skip_serializing_if = "String::is_empty", deserialize_with = "json::nullable")]
    pub created: String,
    /// By which instruction.
    #[serde(skip_serializing_if = "String::is_empty", deserialize_with = "json::nullable")]
    pub created_by: String,
    /// By whom.
    #[serde(skip_serializing_if = "String::is_empty", deserialize_with = "json::nullable")]
    pub author: String,
    /// What the author says.
    #[serde(skip_serializing_if = "String::is_empty", deserialize_with = "json::nullable")]
    pub comment: String,
    /// Whether the step made no layer.
    #[serde(skip_serializing_if = "std::ops::Not::not", deserialize_with = "json::nullable")]
    pub empty_layer: bool,
}

impl ImageConfig {
    /// Reads a configuration.
    ///
    /// # Errors
    /// [`OciError`] if it is too large, not JSON, not made of layers, or has too many of them.
    pub fn parse(bytes: &[u8]) -> Result<Self, OciError> {
        let config: Self = json::parse(CONFIG, bytes, CONFIG_BYTES_MAX)?;
        if !matches!(config.rootfs.kind.as_str(), "" | "layers") {
            return Err(refuse(format!(
                "its root file system is of type {:?}, not layers",
                config.rootfs.kind
            )));
        }
        let n_layers = config.rootfs.diff_ids.len();
        if n_layers > LAYERS_MAX {
            return Err(refuse(format!("it has {n_layers} layers; the limit is {LAYERS_MAX}")));
        }
        Ok(config)
    }

    /// Its bytes, as they are hashed and stored.
    ///
    /// # Errors
    /// [`OciError::Json`], which only a bug of ours can cause.
    pub fn to_bytes(&self) -> Result<Vec<u8>, OciError> {
        serde_json::to_vec(self).map_err(|source| OciError::Json { document: CONFIG, source })
    }

    /// The layers, lowest first.
    #[must_use]
    pub fn diff_ids(&self) -> &[DiffId] {
        &self.rootfs.diff_ids
    }

    /// The platform it says it is for. Docker takes `linux` and the host's architecture for missing words; an
    /// image from elsewhere that leaves them out is better not guessed about, so they stay empty here.
    #[must_use]
    pub fn platform(&self) -> Platform {
        let mut platform = Platform::new(&self.os, &self.architecture, &self.variant);
        platform.os_version.clone_from(&self.os_version);
        platform
    }

    /// Checks that manifest and configuration speak of the same number of layers.
    ///
    /// # Errors
    /// [`OciError::Document`] if they do not.
    pub fn check_layers(&self, manifest: &Manifest) -> Result<(), OciError> {
        let (listed, described) = (manifest.layers.len(), self.rootfs.diff_ids.len());
        if listed == described {
            return Ok(());
        }
        Err(refuse(format!("it describes {described} layers but its manifest lists {listed}")))
    }
}

fn refuse(reason: String) -> OciError {
    OciError::Document { document: CONFIG, reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dockers_configuration_is_understood() {
        let text = r#"{
            "architecture": "arm64", "variant": "v8", "os": "linux", "created": "2026-11-20T23:24:38.625937542Z",
            "author": "a", "docker_version": "20.10.24", "container": "ignored", "x-unknown": {"deep": [1]},
            "config": {
                "Hostname": "", "AttachStdin": false, "User": "1000:1000", "ExposedPorts": {"80/tcp": {}},
                "Env": ["PATH=/bin", "A=b=c"], "Entrypoint": ["/e"], "Cmd": [], "Volumes": {"/data": {}},
                "WorkingDir": "/w", "Labels": {"org.example.a": "1"}, "StopSignal": "SIGQUIT", "StopTimeout": 3,
                "Healthcheck": {"Test": ["CMD-SHELL", "true"], "Interval": 5000000000, "Retries": 2},
                "Shell": ["/bin/bash", "-c"], "OnBuild": ["RUN true"], "Image": "sha256:0"
            },
            "history": [{"created_by": "ADD x", "created": "2026-01-01T00:00:00Z"}, {"empty_layer": true}],
            "rootfs": {"type": "layers", "diff_ids": [
                "sha256:9698128f86466d3e9532aed5574d3214de57706155ce3ba5093784a9a187d0d1"]}
        }"#;
        let image = ImageConfig::parse(text.as_bytes()).unwrap();
        assert_eq!(image.platform().to_string(), "linux/arm64");
        assert_eq!(image.diff_ids().len(), 1);
        assert!(image.history[1].empty_layer);
        let run = &image.config;
        assert_eq!((run.user.as_str(), run.working_dir.as_str()), ("1000:1000", "/w"));
        assert_eq!(run.env, ["PATH=/bin", "A=b=c"]);
        assert_eq!(
            (run.entrypoint.as_deref(), run.cmd.as_deref()),
            (Some(&["/e".to_owned()][..]), Some(&[][..]))
        );
        assert!(run.exposed_ports.contains_key("80/tcp") && run.volumes.contains_key("/data"));
        let health = run.healthcheck.as_ref().unwrap();
        assert_eq!((health.interval, health.retries, health.timeout), (5_000_000_000, 2, 0));
        assert_eq!((run.stop_signal.as_str(), run.stop_timeout), ("SIGQUIT", Some(3)));
        let again = ImageConfig::parse(&image.to_bytes().unwrap()).unwrap();
        assert_eq!(again, image, "what is written reads back");
    }

    #[test]
    fn nulls_and_gaps_of_the_wild_are_read() {
        for text in [
            "{}",
            r#"{"config": null, "rootfs": null, "history": null, "architecture": null}"#,
            r#"{"config": {"Env": null, "Cmd": null, "Volumes": null, "Labels": null, "ExposedPorts": null,
                "Entrypoint": null, "OnBuild": null, "Healthcheck": null, "User": null}}"#,
            r#"{"config": {"Healthcheck": {"Test": null}}, "rootfs": {"type": "layers", "diff_ids": null}}"#,
        ] {
            let image = ImageConfig::parse(text.as_bytes()).expect(text);
            assert!(image.config.env.is_empty() && image.config.cmd.is_none() && image.diff_ids().is_empty());
        }
        let text = r#"{"config": {"Entrypoint": "/bin/sh", "Cmd": ["-c"]}}"#;
        assert_eq!(
            ImageConfig::parse(text.as_bytes()).unwrap().config.entrypoint,
            Some(vec!["/bin/sh".to_owned()])
        );
    }

    #[test]
    fn what_is_wrong_or_too_much_is_refused() {
        let refused =
            |text: &str| coracle_base::explain::chain(&ImageConfig::parse(text.as_bytes()).expect_err(text));
        assert!(refused(r#"{"rootfs": {"type": "vhd"}}"#).contains("vhd"));
        assert!(refused(r#"{"rootfs": {"diff_ids": ["sha256:12"]}}"#).contains("length"));
        assert!(refused(r#"{"os": "linux", "os": "windows"}"#).contains("twice"));
        assert!(refused("[]").contains("cannot read"));
        assert!(refused(&format!("{{}}{}", " ".repeat(CONFIG_BYTES_MAX - 1))).contains("limit"));
        assert!(ImageConfig::parse(format!("{{}}{}", " ".repeat(CONFIG_BYTES_MAX - 2)).as_bytes()).is_ok());
        let layers = |n: usize| {
            let id = format!("\"sha256:{}\"", "0".repeat(64));
            format!(r#"{{"rootfs": {{"type": "layers", "diff_ids": [{}]}}}}"#, vec![id; n].join(","))
        };
        assert!(ImageConfig::parse(layers(LAYERS_MAX).as_bytes()).is_ok());
        assert!(refused(&layers(LAYERS_MAX + 1)).contains("501 layers"));
    }
}
