//! What is known of a container between two commands.
//!
//! ```text
//! <root>/<id>/            0700; its existence is the claim on the id
//!   config.json           the configuration as it was given; written before state.json, never changed; the record
//!                         lock (fcntl) on it is the container's lock
//!   state.json            [`Record`]; replaced atomically; 0600
//!   start.sock            where a created container waits for `start`
//! ```
//!
//! One idea: the file says what the last command did, the kernel says whether that is still true. A status is
//! always computed from both: the process behind the recorded pid counts only if it has the recorded start time.
//!
//! | phase written | lock held | process | status |
//! |---|---|---|---|
//! | creating | yes | - | creating |
//! | creating | no | - | stopped: its creator was killed, and the process with it |
//! | created, starting | - | lives | created |
//! | running | - | lives | running, or paused |
//! | any but creating | - | gone | stopped |
//!
//! `starting` is left behind by a `start` that was killed half-way; whether the program was executed is then asked
//! of the socket: nobody listens there any more once it was.
//!
//! Source: OCI `runtime.md#state`.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use oci_spec::runtime::{Hooks, LinuxNamespaceType, Spec};
use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::OciError;
use super::process;
use crate::cgroup::{Cgroup, Location};
use crate::hooks::HookPoint;

/// Version of [`Record`] on disk.
const VERSION: u32 = 1;
/// Bytes of a state file that are read at most.
const STATE_BYTES_MAX: u64 = 16 << 20;
/// Bytes of a path component of the kernel (`NAME_MAX`), which an id becomes.
const ID_BYTES_MAX: usize = 255;
/// How long a command waits for another one on the same container: longer than any works, hooks aside.
const LOCK_WAIT: Duration = Duration::from_secs(10);
const LOCK_STEP_MS: i64 = 2;

/// How far a container's life has come, as far as commands know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Phase {
    Creating,
    Created,
    Starting,
    Running,
}

/// `state.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Record {
    pub(super) version: u32,
    pub(super) id: String,
    pub(super) oci_version: String,
    pub(super) bundle: PathBuf,
    pub(super) rootfs: PathBuf,
    pub(super) created: String,
    #[serde(default)]
    pub(super) annotations: BTreeMap<String, String>,
    pub(super) phase: Phase,
    /// The first process; 0 while there is none.
    #[serde(default)]
    pub(super) pid: i32,
    /// Its start time, by which it is told from a later process of the same pid.
    #[serde(default)]
    pub(super) start_ticks: u64,
    pub(super) cgroup: Location,
    /// Nothing outlives the first process.
    pub(super) own_pid_namespace: bool,
    /// The hooks that are still to come: poststart and poststop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) hooks: Option<Hooks>,
}

impl Record {
    pub(super) fn new(id: &str, spec: &Spec, bundle: &Path, rootfs: &Path, cgroup: Location) -> Self {
        Self {
            version: VERSION,
            id: id.to_owned(),
            oci_version: spec.version().clone(),
            bundle: bundle.to_owned(),
            rootfs: rootfs.to_owned(),
            created: coracle_base::time::Timestamp::now().rfc3339(),
            annotations: spec.annotations().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect(),
            phase: Phase::Creating,
            pid: 0,
            start_ticks: 0,
            cgroup,
            own_pid_namespace: has_own_pid_namespace(spec),
            hooks: spec.hooks().as_ref().and_then(later_hooks),
        }
    }
}

fn has_own_pid_namespace(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    namespaces.into_iter().flatten().any(|n| n.typ() == LinuxNamespaceType::Pid && n.path().is_none())
}

fn later_hooks(hooks: &Hooks) -> Option<Hooks> {
    let mut later = Hooks::default();
    later.set_poststart(hooks.poststart().clone());
    later.set_poststop(hooks.poststop().clone());
    let any = [HookPoint::Poststart, HookPoint::Poststop].iter().any(|point| !point.of(&later).is_empty());
    any.then_some(later)
}

/// What a container is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// `create` has not finished.
    Creating,
    /// Waits for `start`.
    Created,
    /// The program runs.
    Running,
    /// The program is frozen.
    Paused,
    /// The program has ended.
    Stopped,
}

impl Status {
    /// The word for it in the runtime specification.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// All containers below one root directory.
#[derive(Debug, Clone)]
pub struct Containers {
    root: PathBuf,
    /// The environment of hooks that list none.
    pub(super) hook_env: Vec<CString>,
}

/// One container as it was found.
#[derive(Debug)]
pub struct Container {
    pub(super) dir: PathBuf,
    pub(super) record: Record,
    pub(super) hook_env: Vec<CString>,
}

/// A held lock on one container.
///
/// A record lock belongs to the process that took it. One that belongs to a descriptor (`flock`) would live on in
/// the container's first process, which has copies of all descriptors, when its creator is killed.
#[derive(Debug)]
pub(super) struct Lock(File);

impl Lock {
    /// The configuration, which nobody else may open in the meantime: closing another descriptor of the file in the
    /// same process would give the lock back.
    pub(super) fn config(&mut self) -> io::Result<Vec<u8>> {
        self.0.rewind()?;
        read_from(&mut self.0)
    }
}

impl Containers {
    /// The containers below `root`, which is made with the first of them.
    #[must_use]
    pub const fn new(root: PathBuf) -> Self {
        Self { root, hook_env: Vec::new() }
    }

    /// The same, their hooks that list no environment having this one, `NAME=value` each: that of the caller, as
    /// other runtimes have it. Without, they have none.
    #[must_use]
    pub fn with_hook_env(mut self, env: Vec<CString>) -> Self {
        self.hook_env = env;
        self
    }

    pub(super) fn dir(&self, id: &str) -> Result<PathBuf, OciError> {
        check_id(id)?;
        Ok(self.root.join(id))
    }

    /// Claims an id for a configuration; exactly one of several does.
    pub(super) fn claim(&self, id: &str, text: &[u8]) -> Result<(PathBuf, Lock), OciError> {
        let dir = self.dir(id)?;
        let private = || {
            let mut builder = fs::DirBuilder::new();
            builder.mode(0o700);
            builder
        };
        let mut made = private().create(&dir);
        if made.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            private()
                .recursive(true)
                .create(&self.root)
                .map_err(|error| OciError::io("create", &self.root, error))?;
            made = private().create(&dir);
        }
        match made {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(OciError::Exists { id: id.to_owned() });
            }
            Err(error) => return Err(OciError::io("create", &dir, error)),
        }
        // A `delete --force` may have come between: then the directory is its, and gone.
        let config = dir.join(CONFIG);
        let gone = || OciError::NotExist { id: id.to_owned() };
        let mut lock = match open(&config, OpenOptions::new().create_new(true)) {
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists) => {
                return Err(gone());
            }
            other => other.map_err(|error| OciError::io("create", &config, error))?,
        };
        if !take(&lock, &config)? {
            return Err(gone());
        }
        match lock.write_all(text) {
            Ok(()) => Ok((dir, Lock(lock))),
            Err(error) => {
                crate::error::tolerate(remove(&dir), "the first failure is the one to report");
                Err(OciError::io("write", &config, error))
            }
        }
    }

    /// A container by its id.
    ///
    /// # Errors
    /// There is none, or its state cannot be read.
    pub fn get(&self, id: &str) -> Result<Container, OciError> {
        let dir = self.dir(id)?;
        let record = read_record(&dir, id)?;
        Ok(Container { dir, record, hook_env: self.hook_env.clone() })
    }

    /// All containers by id, and beside them the errors of those whose state cannot be read.
    ///
    /// # Errors
    /// The root cannot be read; `NotFound` if it does not exist.
    pub fn list(&self) -> Result<(Vec<Container>, Vec<OciError>), OciError> {
        let cannot = |error| OciError::io("read", &self.root, error);
        let (mut containers, mut broken) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(&self.root).map_err(cannot)? {
            let name = entry.map_err(cannot)?.file_name();
            let Some(id) = name.to_str().filter(|id| check_id(id).is_ok()) else { continue };
            if !self.root.join(id).is_dir() {
                continue;
            }
            match self.get(id) {
                Ok(container) => containers.push(container),
                Err(error) => broken.push(error),
            }
        }
        containers.sort_by(|a, b| a.record.id.cmp(&b.record.id));
        Ok((containers, broken))
    }
}

/// What `state` tells of a container.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StateView {
    /// Version of the specification that the configuration names.
    pub oci_version: String,
    /// The id.
    pub id: String,
    /// The first process as the caller sees it; 0 once it has ended.
    pub pid: i32,
    /// One of the specification's words.
    pub status: &'static str,
    /// Directory of the bundle.
    pub bundle: PathBuf,
    /// Directory of the root file system.
    pub rootfs: PathBuf,
    /// When it was created, RFC 3339.
    pub created: String,
    /// Annotations of the configuration.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Who owns the state; empty where nobody asked.
    pub owner: String,
}

impl Container {
    /// Its id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.record.id
    }

    /// Its state as the specification wants it shown, true at this moment.
    ///
    /// # Errors
    /// The kernel cannot be asked.
    pub fn state(&self) -> Result<StateView, OciError> {
        let status = self.status()?;
        let record = &self.record;
        Ok(StateView {
            oci_version: record.oci_version.clone(),
            id: record.id.clone(),
            pid: if status == Status::Stopped { 0 } else { record.pid },
            status: status.word(),
            bundle: record.bundle.clone(),
            rootfs: record.rootfs.clone(),
            created: record.created.clone(),
            annotations: record.annotations.clone(),
            owner: String::new(),
        })
    }

    /// User id of the owner of its state.
    ///
    /// # Errors
    /// It was deleted meanwhile.
    pub fn owner(&self) -> Result<u32, OciError> {
        fs::metadata(&self.dir)
            .map(|meta| meta.uid())
            .map_err(|error| OciError::io("look at", &self.dir, error))
    }

    /// What it is doing at this moment.
    ///
    /// # Errors
    /// The kernel cannot be asked.
    pub fn status(&self) -> Result<Status, OciError> {
        if self.record.phase == Phase::Creating && is_locked(&self.dir)? {
            return Ok(Status::Creating);
        }
        self.status_under_lock()
    }

    /// The same for whoever holds the lock, or knows that nobody does.
    pub(super) fn status_under_lock(&self) -> Result<Status, OciError> {
        let record = &self.record;
        if !process::is_alive(record.pid, record.start_ticks) {
            return Ok(Status::Stopped);
        }
        let waits = match record.phase {
            Phase::Created => true,
            Phase::Starting => coracle_sys::socket::connect(&self.socket()).is_ok(),
            Phase::Creating | Phase::Running => false,
        };
        match (self.is_frozen(), waits) {
            (true, _) => Ok(Status::Paused),
            (false, true) => Ok(Status::Created),
            (false, false) => Ok(Status::Running),
        }
    }

    /// Cgroups that cannot be asked freeze nobody: they are gone, or not the caller's to see.
    fn is_frozen(&self) -> bool {
        self.cgroup().and_then(|cgroup| Ok(cgroup.is_frozen()?)).unwrap_or(false)
    }

    pub(super) fn cgroup(&self) -> Result<Cgroup, OciError> {
        Ok(Cgroup::open(&self.record.cgroup)?)
    }

    /// Where it waits for `start`.
    pub(super) fn socket(&self) -> PathBuf {
        self.dir.join(SOCKET)
    }

    /// A descriptor of its first process, if that lives.
    pub(super) fn first_process(&self) -> Result<Option<OwnedFd>, OciError> {
        process::open(self.record.pid, self.record.start_ticks)
    }

    /// Its lock. Waits for other commands, with a bound.
    pub(super) fn lock(&self) -> Result<Lock, OciError> {
        lock(&self.dir, &self.record.id)
    }

    /// The same container once more: another command may have changed it before its lock was ours.
    pub(super) fn reread(&mut self) -> Result<(), OciError> {
        self.record = read_record(&self.dir, &self.record.id)?;
        Ok(())
    }

    pub(super) fn write(&self) -> Result<(), OciError> {
        write_record(&self.dir, &self.record)
    }
}

/// Name of the socket that a created container waits at.
pub(super) const SOCKET: &str = "start.sock";
const STATE: &str = "state.json";
pub(super) const CONFIG: &str = "config.json";

/// Takes the lock of a container, waiting for it with a bound. `NotExist` if its directory is gone by then.
pub(super) fn lock(dir: &Path, id: &str) -> Result<Lock, OciError> {
    let config = dir.join(CONFIG);
    let until = coracle_base::time::monotonic() + LOCK_WAIT;
    loop {
        // A claim need not have come to its file.
        let file = match open(&config, OpenOptions::new().create(true).truncate(false)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(OciError::NotExist { id: id.to_owned() });
            }
            other => other.map_err(|error| OciError::io("open", &config, error))?,
        };
        if take(&file, &config)? {
            return Ok(Lock(file));
        }
        if coracle_base::time::monotonic() >= until {
            return Err(OciError::Busy { id: id.to_owned() });
        }
        process::pause(LOCK_STEP_MS);
    }
}

/// Whether another process holds the lock of a container. Not to be asked by whoever holds it.
pub(super) fn is_locked(dir: &Path) -> Result<bool, OciError> {
    let config = dir.join(CONFIG);
    match open(&config, &mut OpenOptions::new()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        other => Ok(!take(&other.map_err(|error| OciError::io("open", &config, error))?, &config)?),
    }
}

fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    options.read(true).write(true).mode(0o600).open(path)
}

/// Whether the lock could be had, and is that of the file at its path.
fn take(file: &File, path: &Path) -> Result<bool, OciError> {
    let cannot = |error: io::Error| OciError::io("lock", path, error);
    match fcntl_lock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK | Errno::ACCESS) => return Ok(false),
        Err(error) => return Err(cannot(error.into())),
    }
    let inode = |meta: fs::Metadata| (meta.dev(), meta.ino());
    let locked = file.metadata().map(inode).map_err(cannot)?;
    Ok(fs::metadata(path).map(inode).ok() == Some(locked))
}

fn read_record(dir: &Path, id: &str) -> Result<Record, OciError> {
    let bytes = match read(&dir.join(STATE)) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(OciError::NotExist { id: id.to_owned() });
        }
        Err(error) => return Err(OciError::io("read", dir.join(STATE), error)),
    };
    let damaged = |reason: String| OciError::Damaged { id: id.to_owned(), reason };
    let record: Record = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
    if record.version != VERSION {
        return Err(damaged(format!("it is of version {}, this runtime knows {VERSION}", record.version)));
    }
    Ok(record)
}

/// Reads a whole file of at most [`STATE_BYTES_MAX`] bytes.
pub(super) fn read(path: &Path) -> io::Result<Vec<u8>> {
    read_from(&mut File::open(path)?)
}

fn read_from(file: &mut File) -> io::Result<Vec<u8>> {
    // Its length and one more byte: enough for one call to read it and one to see its end.
    let length = file.metadata()?.len().min(STATE_BYTES_MAX) + 1;
    let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or(0));
    file.take(STATE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > STATE_BYTES_MAX {
        return Err(io::Error::other(format!("it is larger than {STATE_BYTES_MAX} bytes")));
    }
    Ok(bytes)
}

pub(super) fn write_record(dir: &Path, record: &Record) -> Result<(), OciError> {
    let file = dir.join(STATE);
    let cannot = |error: io::Error| OciError::io("write", &file, error);
    let bytes = serde_json::to_vec(record).map_err(|error| cannot(error.into()))?;
    // One writer at a time, by the lock: the name need not be unique.
    let beside = dir.join(".state.json");
    write_file(&beside, &bytes).and_then(|()| fs::rename(&beside, &file)).map_err(cannot)
}

fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?.write_all(bytes)
}

/// Removes a container's directory. Usually it holds what is removed by name here, which spares looking into it.
pub(super) fn remove(dir: &Path) -> Result<(), OciError> {
    for name in [STATE, CONFIG] {
        match fs::remove_file(dir.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(OciError::io("remove", dir.join(name), error));
            }
            _ => {}
        }
    }
    match fs::remove_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
            fs::remove_dir_all(dir).map_err(|error| OciError::io("remove", dir, error))
        }
        other => other.map_err(|error| OciError::io("remove", dir, error)),
    }
}

/// An id becomes the name of a directory: one component (runc's rule).
pub(super) fn is_id_character(c: char) -> bool {
    c.is_ascii_alphanumeric() || "_+.-".contains(c)
}

pub(super) fn check_id(id: &str) -> Result<(), OciError> {
    if id.is_empty() {
        return Err(OciError::invalid("container id cannot be empty"));
    }
    if id.len() > ID_BYTES_MAX || !id.chars().all(is_id_character) || id == "." || id == ".." {
        return Err(OciError::InvalidId { id: id.to_owned() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("coracle-oci-{name}-{}", std::process::id()));
        fs::remove_dir_all(&dir).ok();
        dir
    }

    fn record(id: &str) -> Record {
        let cgroup = Location::resolve(None, id, crate::cgroup::Driver::Cgroupfs).unwrap();
        Record::new(id, &crate::defaults::default_spec(), Path::new("/b"), Path::new("/b/rootfs"), cgroup)
    }

    #[test]
    fn ids_are_one_harmless_path_component() {
        for id in ["a", "web-1", "A_b+c.d", ".hidden", "-x"] {
            assert!(check_id(id).is_ok(), "{id}");
        }
        for id in ["", ".", "..", "a/b", "a b", "ü", &"x".repeat(256)] {
            assert!(check_id(id).is_err(), "{id}");
        }
    }

    #[test]
    fn of_many_claims_on_one_id_exactly_one_succeeds() {
        let root = scratch("claim");
        let won: Vec<bool> = std::thread::scope(|scope| {
            let all: Vec<_> = (0..20)
                .map(|_| scope.spawn(|| Containers::new(root.clone()).claim("x", b"{}").is_ok()))
                .collect();
            all.into_iter().map(|one| one.join().unwrap()).collect()
        });
        assert_eq!(won.iter().filter(|won| **won).count(), 1);
        assert_eq!(fs::metadata(&root).unwrap().mode() & 0o777, 0o700);
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn a_container_whose_creator_is_gone_has_stopped() {
        let root = scratch("phase");
        let containers = Containers::new(root.clone());
        let (dir, lock) = containers.claim("x", b"{}").unwrap();
        assert!(matches!(containers.get("x"), Err(OciError::NotExist { .. })), "no record yet");
        write_record(&dir, &record("x")).unwrap();
        drop(lock);
        assert_eq!(containers.get("x").unwrap().status().unwrap(), Status::Stopped);
        assert_eq!(fs::metadata(dir.join(STATE)).unwrap().mode() & 0o777, 0o600);
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn another_process_of_the_same_pid_is_not_the_container() {
        let root = scratch("reuse");
        let containers = Containers::new(root.clone());
        let (dir, _lock) = containers.claim("x", b"{}").unwrap();
        let mut own = record("x");
        own.phase = Phase::Running;
        own.pid = i32::try_from(std::process::id()).unwrap();
        own.start_ticks = crate::birth::start_ticks(own.pid);
        write_record(&dir, &own).unwrap();
        assert_eq!(containers.get("x").unwrap().status().unwrap(), Status::Running);
        own.start_ticks += 1;
        write_record(&dir, &own).unwrap();
        let container = containers.get("x").unwrap();
        assert_eq!(container.status().unwrap(), Status::Stopped);
        assert_eq!(container.state().unwrap().pid, 0);
        assert!(container.first_process().unwrap().is_none());
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn broken_containers_are_listed_apart() {
        let root = scratch("list");
        let containers = Containers::new(root.clone());
        assert!(containers.list().is_err());
        for (id, state) in [("a", None), ("b", Some("{")), ("c", Some("{\"version\": 9}"))] {
            let (dir, _lock) = containers.claim(id, b"{}").unwrap();
            if let Some(text) = state {
                fs::write(dir.join(STATE), text).unwrap();
            }
        }
        let (dir, _lock) = containers.claim("d", b"{}").unwrap();
        write_record(&dir, &record("d")).unwrap();
        let (found, broken) = containers.list().unwrap();
        assert_eq!(found.iter().map(Container::id).collect::<Vec<_>>(), ["d"]);
        assert_eq!(broken.len(), 3);
        fs::remove_dir_all(root).unwrap();
    }
}
