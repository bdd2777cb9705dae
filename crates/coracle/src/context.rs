//! What every command knows: where things lie, and how to open the engine.

use std::path::PathBuf;
use std::sync::Arc;

use coracle_engine::{Caller, Config, Engine};
use coracle_registry::{Credential, CredentialSource, DockerConfig, Proxies, RegistryError};
use coracle_state::Dirs;

use crate::cli::flags::Parsed;
use crate::environment::filled;
use crate::failure::Failure;
use crate::rootless::{self, place};

/// What the global flags and the environment say.
#[derive(Debug)]
pub(crate) struct Context {
    /// Roots of all state.
    pub(crate) dirs: Dirs,
    /// Directory of Docker's `config.json`.
    config_dir: PathBuf,
    /// The command's name, for messages of those who wait for its locks.
    pub(crate) command: String,
    /// Print more.
    pub(crate) debug: bool,
    /// This process has less than the rights of the machine's root.
    pub(crate) rootless: bool,
}

/// Roots of state: a flag, a variable, or the default; a user's own below his home.
pub(crate) fn dirs(globals: &Parsed, user: Option<u32>) -> Dirs {
    let given = |flag: Option<&str>, variable: &str| {
        flag.filter(|f| !f.is_empty()).map(PathBuf::from).or_else(|| filled(variable).map(PathBuf::from))
    };
    let data = given(globals.text("root").or(globals.text("data-dir")), "CORACLE_DATA_DIR");
    let run = given(globals.text("run-dir"), "CORACLE_RUN_DIR");
    Dirs {
        data: data.unwrap_or_else(|| match user {
            Some(uid) => place::data(uid),
            None => PathBuf::from("/var/lib/coracle"),
        }),
        run: run.unwrap_or_else(|| match user {
            Some(uid) => place::run(uid),
            None => PathBuf::from("/run/coracle"),
        }),
    }
}

/// Who calls, by the numbers of the host; behind `sudo` the one who called that.
pub(crate) fn caller() -> Caller {
    let number = |name: &str| filled(name)?.parse::<u32>().ok();
    if rootless::is_rootless() {
        let gid = rustix::process::getegid().as_raw();
        let gid = coracle_sys::userns::gid_outside(gid).ok().flatten().unwrap_or(gid);
        return Caller { uid: host_uid(), gid };
    }
    match (number("SUDO_UID"), number("SUDO_GID")) {
        (Some(uid), Some(gid)) => Caller { uid, gid },
        _ => Caller::default(),
    }
}

/// The user by the number that the host knows him by.
fn host_uid() -> u32 {
    let uid = rustix::process::geteuid().as_raw();
    coracle_sys::userns::uid_outside(uid).ok().flatten().unwrap_or(uid)
}

impl Context {
    pub(crate) fn new(globals: &Parsed, command: &str) -> Self {
        let config_dir =
            globals.text("config").map(PathBuf::from).or_else(|| filled("DOCKER_CONFIG").map(PathBuf::from));
        let home = || PathBuf::from(filled("HOME").unwrap_or_else(|| "/root".to_owned())).join(".docker");
        let rootless = rootless::is_rootless();
        Self {
            dirs: dirs(globals, rootless.then(host_uid)),
            rootless,
            config_dir: config_dir.unwrap_or_else(home),
            command: format!("coracle {command}"),
            debug: globals.is_on("debug"),
        }
    }

    /// Opens the engine. Cheap: no file but the state directories is touched.
    pub(crate) fn engine(&self) -> Result<Engine, Failure> {
        let either = |upper: &str, lower: &str| filled(lower).or_else(|| filled(upper));
        let registry = coracle_registry::Config {
            credentials: Arc::new(Lazy { dir: self.config_dir.clone() }),
            insecure: filled("CORACLE_INSECURE_REGISTRIES")
                .map(|list| list.split(',').map(|r| r.trim().to_owned()).collect())
                .unwrap_or_default(),
            proxies: Proxies {
                http: either("HTTP_PROXY", "http_proxy"),
                https: either("HTTPS_PROXY", "https_proxy"),
                no_proxy: either("NO_PROXY", "no_proxy"),
            },
            ..coracle_registry::Config::default()
        };
        let config = Config { dirs: self.dirs.clone(), command: self.command.clone(), registry };
        Engine::open(config).map_err(|e| Failure::of(&e))
    }
}

/// Docker's configuration, read when a registry asks for credentials and not before.
#[derive(Debug)]
struct Lazy {
    dir: PathBuf,
}

impl CredentialSource for Lazy {
    fn get(&self, host: &str) -> Result<Option<Credential>, RegistryError> {
        DockerConfig::load(&self.dir, filled("DOCKER_AUTH_CONFIG").as_deref())?.get(host)
    }
}

/// The engine's errors as failures.
impl From<coracle_engine::EngineError> for Failure {
    fn from(error: coracle_engine::EngineError) -> Self {
        let mut failure = Self::of(&error);
        match error {
            coracle_engine::EngineError::Start { exit_code, .. } => failure.code = exit_code,
            // Docker has words of its own for networks.
            coracle_engine::EngineError::NotFound { what: "network", name } => {
                failure.message = format!("network {name} not found");
            }
            _ => {}
        }
        failure
    }
}

impl From<coracle_monitor::MonitorError> for Failure {
    fn from(error: coracle_monitor::MonitorError) -> Self {
        match &error {
            coracle_monitor::MonitorError::Io { source, .. }
                if source.kind() == std::io::ErrorKind::BrokenPipe =>
            {
                Self::silent(141)
            }
            coracle_monitor::MonitorError::NotStarted(why) => {
                Self::of(&error).with_code(u8::try_from(why.exit_code).unwrap_or(1))
            }
            _ => Self::of(&error),
        }
    }
}
