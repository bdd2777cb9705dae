//! Detached root file systems put together from layers: EROFS images below an overlay, file bodies beside them.
//!
//! Each layer's `meta.erofs` is mounted on its own and given to overlayfs as a lower layer; bodies are found by
//! `trusted.overlay.redirect` in the `objects` directory, a data-only layer. On Linux 6.15 and later nothing is
//! ever attached to a mount tree: what is not finished disappears with its file descriptor. Older kernels refuse
//! detached mounts as layers, so a thread with a mount namespace of its own attaches them for an instant.
//!
//! | kernel | layers | objects |
//! |---|---|---|
//! | ≥ 6.15 | EROFS on the file, detached, by fd | `datadir+` by fd |
//! | 6.12-6.14 | EROFS on the file, attached in a private namespace | `lowerdir=2:1:0::objects` |
//! | 6.5-6.11 | EROFS on a loop device, attached likewise | the same |
//! | < 6.5 | the same | lowest ordinary layer, hidden by a whiteout in a mask layer on top |
//!
//! No kernel version is read: each row is tried when the kernel refuses the one above (`ENOTBLK` from EROFS on a
//! file, `EINVAL` or `EOPNOTSUPP` from overlayfs), so back-ports are used as they are found.
//!
//! Inside a user namespace the kernel mounts no EROFS and no overlay with trusted attributes. There the lower layer
//! is one plain directory, made beforehand from all layers, and the overlay is mounted with `userxattr` (5.11). With
//! 6.16 and later the files of that directory may be empty and point to objects by `user.overlay.redirect`
//! ([`probe_user_objects`]).
//!
//! Invariant: `metacopy=on` and `redirect_dir=on` outside user namespaces; without the first only the bottom layer
//! may point to objects. Sources: Linux `Documentation/filesystems/overlayfs.rst`, `erofs.rst`, `fsconfig(2)`.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fmt::Write as _;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags,
};
use serde::{Deserialize, Serialize};

use crate::idmap::{self, Maps};
use crate::mount::{self, Attributes};

/// The kernel copies at most this many bytes of a string option, its NUL included.
const OPTION_BYTES_MAX: usize = 256;
/// The options of `mount(2)` fit one page, its NUL included.
const MOUNT_DATA_BYTES_MAX: usize = 4096;
/// Somebody else may take the free loop device first; so often is asked for another.
const LOOP_RETRIES_MAX: u32 = 64;
/// `MOUNT_ATTR_IDMAP` of `linux/mount.h`.
const ATTR_IDMAP: u64 = 0x0010_0000;
/// The name below the objects directory that kernels without data-only layers must hide.
const OBJECTS_NAME: &str = ".cobj";

/// A root file system as parts: what to stack, not how.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LayeredRoot {
    /// The layers' EROFS images (plain directories with `user_xattrs`), bottom first. May be empty: the root is then
    /// the upper, or empty.
    pub lowers: Vec<PathBuf>,
    /// The directory that `trusted.overlay.redirect` of the layers starts from.
    pub objects: Option<PathBuf>,
    /// Where changes go; without it the root is read-only.
    pub upper: Option<PathBuf>,
    /// The overlay's scratch directory, on the file system of `upper`.
    pub work: Option<PathBuf>,
    /// Changes need not survive a crash of the machine: no fsync at copy-up, no sync at the end. The mark that a
    /// volatile mount leaves in `work` is removed, so a second mount in the same boot succeeds.
    pub volatile: bool,
    /// The layers are plain directories and the overlay's marks are `user.overlay.*`: all that the kernel allows to
    /// root of a user namespace. A rename of a directory of a layer copies it, a change of attributes copies the file.
    #[serde(default)]
    pub user_xattrs: bool,
    /// The layers' owners as the processes of this user namespace are known outside: each layer is an id-mapped mount
    /// (Linux 5.19), so nothing is copied to change its owner. The upper directory stores the ids outside.
    #[serde(default)]
    pub maps: Option<Maps>,
}

/// How to stack the parts. [`LayeredRoot::mount`] finds the first one that the kernel takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recipe {
    /// Detached mounts as layers.
    Detached,
    /// Layers attached in a private mount namespace, objects as a data-only layer.
    Attached,
    /// As `Attached`, with a loop device for each layer.
    Loop,
    /// As `Loop`, with objects as ordinary lowest layer below a mask.
    Masked,
}

/// A part of the root that could not be mounted, and what the kernel logged about it.
#[derive(Debug, thiserror::Error)]
#[error("cannot mount {subject}{log}")]
struct MountFailure {
    subject: String,
    log: String,
    source: Errno,
}

impl MountFailure {
    fn at(subject: impl Into<String>) -> impl FnOnce(Errno) -> io::Error {
        let subject = subject.into();
        move |source| Self { subject, log: String::new(), source }.into_io()
    }

    fn into_io(self) -> io::Error {
        io::Error::new(io::Error::from(self.source).kind(), self)
    }
}

impl LayeredRoot {
    /// Mounts the root and returns it as a detached mount, attached nowhere: the caller moves it into place, and
    /// everything below it lives exactly as long. Blocks only for the few pages the kernel reads.
    ///
    /// # Errors
    /// What the kernel refused, naming the layer or the overlay.
    pub fn mount(&self) -> io::Result<OwnedFd> {
        self.mount_leaving(&mut Vec::new())
    }

    /// The same for callers in a hurry: what is not needed any more goes to `leftovers` and should be closed when
    /// there is time. The overlay has mounts of its own of the layers, but closing ours waits for a grace period of
    /// the kernel, 0.1 ms for each layer.
    ///
    /// # Errors
    /// What the kernel refused, naming the layer or the overlay.
    pub fn mount_leaving(&self, leftovers: &mut Vec<OwnedFd>) -> io::Result<OwnedFd> {
        self.forget_volatile_mark()?;
        let lowers = self.distinct_lowers();
        let layers = self.mount_layers(&lowers, Backing::File)?;
        match self.overlay_detached(&layers) {
            // The second is said of descriptors where overlayfs knows option strings only (before 6.5).
            Err(refusal) if matches!(refusal.source, Errno::INVAL | Errno::OPNOTSUPP) => {}
            Err(refusal) => return Err(refusal.into_io()),
            Ok(root) => {
                leftovers.extend(layers);
                return Ok(root);
            }
        }
        self.forget_volatile_mark()?;
        match in_private_namespace(|| self.overlay_attached(&layers, Data::Only)) {
            // Objects as an ordinary layer need `metacopy=on`, which `userxattr` excludes.
            Err(refusal)
                if refusal.raw_os_error() == Some(Errno::INVAL.raw_os_error()) && !self.user_xattrs => {}
            Err(refusal) => return Err(self.name_refusal(&refusal)),
            Ok(root) => return Ok(root),
        }
        // The namespace of the attempt took the layers with it; its mark was left.
        self.forget_volatile_mark()?;
        let layers = self.mount_layers(&lowers, Backing::File)?;
        in_private_namespace(|| self.overlay_attached(&layers, Data::Masked))
            .map_err(|refusal| self.name_refusal(&refusal))
    }

    /// Mounts the root by one recipe, for tests and for telling what this kernel can do.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn mount_by(&self, recipe: Recipe) -> io::Result<OwnedFd> {
        self.forget_volatile_mark()?;
        let (backing, data) = match recipe {
            Recipe::Detached => {
                let layers = self.mount_layers(&self.distinct_lowers(), Backing::File)?;
                return self.overlay_detached(&layers).map_err(MountFailure::into_io);
            }
            Recipe::Attached => (Backing::File, Data::Only),
            Recipe::Loop => (Backing::Loop, Data::Only),
            Recipe::Masked => (Backing::Loop, Data::Masked),
        };
        let layers = self.mount_layers(&self.distinct_lowers(), backing)?;
        in_private_namespace(|| self.overlay_attached(&layers, data))
            .map_err(|refusal| self.name_refusal(&refusal))
    }

    fn name_refusal(&self, refusal: &io::Error) -> io::Error {
        match refusal.raw_os_error() {
            Some(code) => MountFailure::at(self.subject())(Errno::from_raw_os_error(code)),
            None => io::Error::new(refusal.kind(), refusal.to_string()),
        }
    }

    fn subject(&self) -> String {
        let n_layers = self.lowers.len();
        match &self.upper {
            Some(upper) => {
                format!("the overlay of {n_layers} layers with upper directory {}", upper.display())
            }
            None => format!("the read-only overlay of {n_layers} layers"),
        }
    }

    /// The layers, topmost first. A layer that occurs again higher up adds nothing where it lies lower, since all
    /// its entries are in the higher one too; empty layers make this common.
    fn distinct_lowers(&self) -> Vec<&Path> {
        let mut seen = BTreeSet::new();
        let topmost_first = self.lowers.iter().rev().map(PathBuf::as_path);
        topmost_first.filter(|path| seen.insert(path.as_os_str().as_bytes())).collect()
    }

    fn mount_layers(&self, lowers: &[&Path], backing: Backing) -> io::Result<Vec<OwnedFd>> {
        let mut layers = Vec::with_capacity(lowers.len());
        for path in lowers {
            layers.push(if self.user_xattrs { clone_dir(path)? } else { mount_erofs(path, backing)? });
        }
        if let Some(maps) = &self.maps {
            let table = idmap::user_namespace(&maps.uids, &maps.gids)?;
            for (layer, path) in layers.iter().zip(lowers) {
                map_ids(layer, &table)
                    .map_err(MountFailure::at(format!("the layer {} with other owners", path.display())))?;
            }
        }
        Ok(layers)
    }

    /// Without this the kernel refuses to mount a volatile upper again, even if it has refused the first attempt.
    fn forget_volatile_mark(&self) -> io::Result<()> {
        let Some(work) = self.work.as_ref().filter(|_| self.volatile) else { return Ok(()) };
        let mark = work.join("work/incompat/volatile");
        for (path, flags) in [(mark.join("dirty"), AtFlags::empty()), (mark, AtFlags::REMOVEDIR)] {
            match rustix::fs::unlinkat(CWD, path, flags) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn overlay_detached(&self, layers: &[OwnedFd]) -> Result<OwnedFd, MountFailure> {
        let overlay = Context::open("overlay").map_err(|source| self.refusal(source, String::new()))?;
        // Open until the overlay is created: a detached mount ends with its descriptor.
        let empties =
            self.empty_layers(layers.len()).map_err(|source| self.refusal(source, String::new()))?;
        let stack = || {
            for layer in layers {
                rustix::mount::fsconfig_set_fd(&overlay.0, "lowerdir+", layer)?;
            }
            for empty in &empties {
                rustix::mount::fsconfig_set_fd(&overlay.0, "lowerdir+", empty)?;
            }
            if let Some(objects) = &self.objects {
                rustix::mount::fsconfig_set_fd(&overlay.0, "datadir+", open_dir(objects)?)?;
            }
            if let (Some(upper), Some(work)) = (&self.upper, &self.work) {
                rustix::mount::fsconfig_set_fd(&overlay.0, "upperdir", open_dir(upper)?)?;
                rustix::mount::fsconfig_set_fd(&overlay.0, "workdir", open_dir(work)?)?;
                if self.volatile {
                    rustix::mount::fsconfig_set_flag(&overlay.0, "volatile")?;
                }
            }
            if self.user_xattrs {
                rustix::mount::fsconfig_set_flag(&overlay.0, "userxattr")?;
            } else {
                rustix::mount::fsconfig_set_string(&overlay.0, "metacopy", "on")?;
                rustix::mount::fsconfig_set_string(&overlay.0, "redirect_dir", "on")?;
            }
            rustix::mount::fsconfig_create(&overlay.0)?;
            overlay.mount()
        };
        stack().map_err(|source| self.refusal(source, overlay.log()))
    }

    /// Empty directories to stand in: an overlay needs one layer that is not only data, a read-only one two in all.
    fn empty_layers(&self, n_layers: usize) -> Result<Vec<OwnedFd>, Errno> {
        let n_others = usize::from(self.objects.is_some()) + usize::from(self.upper.is_some());
        let n_empty = usize::from(n_layers == 0).max(2_usize.saturating_sub(n_layers + n_others));
        (0..n_empty).map(|_| tmpfs_mount()).collect()
    }

    fn refusal(&self, source: Errno, log: String) -> MountFailure {
        MountFailure { subject: self.subject(), log, source }
    }

    /// Stacks layers inside a private mount namespace. They are attached in a small tmpfs under short relative
    /// names, since all options of `mount(2)` must fit one page.
    fn overlay_attached(&self, layers: &[OwnedFd], data: Data) -> io::Result<OwnedFd> {
        let scratch = tmpfs_mount()?;
        rustix::mount::move_mount(&scratch, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        rustix::process::fchdir(&scratch)?;
        for name in ["root", "mask", "empty"] {
            rustix::fs::mkdirat(&scratch, name, Mode::RWXU)?;
        }
        let marks = if self.user_xattrs { "userxattr" } else { "metacopy=on,redirect_dir=on" };
        let mut options = format!("{marks},lowerdir=");
        if matches!(data, Data::Masked) && self.objects.is_some() {
            rustix::fs::mknodat(
                &scratch,
                format!("mask/{OBJECTS_NAME}"),
                FileType::CharacterDevice,
                Mode::empty(),
                0,
            )?;
            options.push_str("mask:");
        }
        for (idx, layer) in layers.iter().enumerate() {
            let name = idx.to_string();
            rustix::fs::mkdirat(&scratch, &name, Mode::RWXU)?;
            rustix::mount::move_mount(layer, "", &scratch, &name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
            options.push_str(&name);
            options.push(':');
        }
        options.push_str("empty");
        let mut options = options.into_bytes();
        if let Some(objects) = &self.objects {
            options.extend_from_slice(if matches!(data, Data::Only) { b"::" } else { b":" });
            push_escaped(&mut options, objects);
        } else if self.upper.is_none() && layers.is_empty() {
            options.extend_from_slice(b":mask");
        }
        if let (Some(upper), Some(work)) = (&self.upper, &self.work) {
            options.extend_from_slice(b",upperdir=");
            push_escaped(&mut options, upper);
            options.extend_from_slice(b",workdir=");
            push_escaped(&mut options, work);
            if self.volatile {
                options.extend_from_slice(b",volatile");
            }
        }
        mount_overlay_at(&scratch, options)
    }
}

/// Mounts an overlay by its options and returns it detached.
fn mount_overlay_at(scratch: &OwnedFd, options: Vec<u8>) -> io::Result<OwnedFd> {
    if options.len() >= MOUNT_DATA_BYTES_MAX {
        let text = format!(
            "cannot stack the layers: {} bytes of options, this kernel takes {MOUNT_DATA_BYTES_MAX} (Linux 6.15 has \
             no such bound)",
            options.len()
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let options = CString::new(options)?;
    rustix::mount::mount("overlay", "root", "overlay", MountFlags::empty(), options.as_c_str())?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    Ok(rustix::mount::open_tree(scratch, "root", flags)?)
}

/// Overlayfs splits layers at `:`, `mount(2)`'s options at `,`; a backslash protects both.
fn push_escaped(options: &mut Vec<u8>, path: &Path) {
    for &byte in path.as_os_str().as_bytes() {
        if matches!(byte, b'\\' | b':' | b',') {
            options.push(b'\\');
        }
        options.push(byte);
    }
}

/// What an EROFS image is mounted from.
#[derive(Clone, Copy)]
enum Backing {
    /// The file, or a loop device where the kernel cannot.
    File,
    Loop,
}

/// How the kernel is told about objects.
#[derive(Clone, Copy)]
enum Data {
    Only,
    Masked,
}

fn map_ids(layer: &OwnedFd, table: &OwnedFd) -> Result<(), Errno> {
    let user_namespace = u64::try_from(table.as_raw_fd()).map_err(|_negative| Errno::BADF)?;
    let attributes = Attributes { set: ATTR_IDMAP, user_namespace, ..Attributes::default() };
    mount::set_attributes(layer.as_fd(), false, &attributes)
        .map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::INVAL))
}

/// A directory as a detached mount.
fn clone_dir(path: &Path) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let subject = || format!("the layer {}", path.display());
    rustix::mount::open_tree(CWD, path, flags).map_err(MountFailure::at(subject()))
}

/// Whether an overlay inside a user namespace finds the bodies of files in objects (Linux 6.16). `scratch` is an
/// empty directory on the file system where the layers lie; what is made in it is the caller's to remove.
///
/// # Errors
/// `scratch` cannot be written to, or this process may mount nothing at all.
pub fn probe_user_objects(scratch: &Path) -> io::Result<bool> {
    const BODY: &[u8] = b"found";
    let (layer, objects) = (scratch.join("layer"), scratch.join("objects"));
    for dir in [&layer, &objects] {
        std::fs::create_dir(dir)?;
    }
    std::fs::write(objects.join("body"), BODY)?;
    let file = std::fs::File::create_new(layer.join("file"))?;
    file.set_len(BODY.len() as u64)?;
    let no_flags = rustix::fs::XattrFlags::empty();
    for (name, value) in [("user.overlay.metacopy", &b""[..]), ("user.overlay.redirect", b"/body")] {
        match rustix::fs::fsetxattr(&file, name, value, no_flags) {
            Ok(()) => {}
            Err(Errno::NOTSUP) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        }
    }
    let root = LayeredRoot {
        lowers: vec![layer],
        objects: Some(objects),
        user_xattrs: true,
        ..LayeredRoot::default()
    };
    let root = match root.mount() {
        Ok(root) => root,
        Err(refusal) if refusal.kind() == io::ErrorKind::PermissionDenied => return Err(refusal),
        Err(_too_old) => return Ok(false),
    };
    let Ok(file) = rustix::fs::openat(&root, "file", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) else {
        return Ok(false);
    };
    let mut body = [0; BODY.len()];
    Ok(rustix::io::read(&file, &mut body).is_ok_and(|n_bytes| n_bytes == BODY.len() && body == BODY))
}

fn mount_erofs(path: &Path, backing: Backing) -> io::Result<OwnedFd> {
    let subject = || format!("the layer {}", path.display());
    if matches!(backing, Backing::File) {
        let erofs = Context::open("erofs").map_err(MountFailure::at(subject()))?;
        match erofs.create_from(path).and_then(|()| erofs.mount()) {
            Err(Errno::NOTBLK) => {}
            Err(source) => {
                return Err(MountFailure { subject: subject(), log: erofs.log(), source }.into_io());
            }
            Ok(mount) => return Ok(mount),
        }
    }
    let (_device, device_path) = attach_loop(path)?;
    let erofs = Context::open("erofs").map_err(MountFailure::at(subject()))?;
    rustix::mount::fsconfig_set_flag(&erofs.0, "ro")?;
    erofs
        .create_from(&device_path)
        .and_then(|()| erofs.mount())
        .map_err(|source| MountFailure { subject: subject(), log: erofs.log(), source }.into_io())
}

/// A file system being configured.
struct Context(OwnedFd);

impl Context {
    fn open(fs_name: &str) -> Result<Self, Errno> {
        rustix::mount::fsopen(fs_name, FsOpenFlags::FSOPEN_CLOEXEC).map(Self)
    }

    fn create_from(&self, source: &Path) -> Result<(), Errno> {
        if source.as_os_str().len() < OPTION_BYTES_MAX {
            rustix::mount::fsconfig_set_string(&self.0, "source", source)?;
            return rustix::mount::fsconfig_create(&self.0);
        }
        let file = rustix::fs::open(source, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        rustix::mount::fsconfig_set_string(&self.0, "source", format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        rustix::mount::fsconfig_create(&self.0)
    }

    fn mount(&self) -> Result<OwnedFd, Errno> {
        rustix::mount::fsmount(&self.0, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
    }

    /// What the kernel logged about a failure, ready to follow a subject.
    fn log(&self) -> String {
        let mut text = String::new();
        let mut line = [0_u8; 512];
        // The kernel keeps eight messages.
        for _ in 0..8 {
            let Ok(n_bytes) = rustix::io::read(&self.0, &mut line) else { break };
            let line = String::from_utf8_lossy(line.get(..n_bytes).unwrap_or_default());
            let start = if text.is_empty() { " (" } else { "; " };
            text.push_str(start);
            text.push_str(line.trim_end().trim_start_matches("e ").trim_start_matches("w "));
        }
        if !text.is_empty() {
            text.push(')');
        }
        text
    }
}

fn open_dir(path: &Path) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

fn tmpfs_mount() -> Result<OwnedFd, Errno> {
    let tmpfs = Context::open("tmpfs")?;
    rustix::mount::fsconfig_set_string(&tmpfs.0, "mode", "0755")?;
    rustix::mount::fsconfig_create(&tmpfs.0)?;
    tmpfs.mount()
}

/// Runs `work` on a thread of its own in a mount namespace of its own, which ends with it.
fn in_private_namespace<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: the flags do not include FILES: all threads keep seeing the same descriptors.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }?;
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            rustix::mount::mount_change("/", private)?;
            work()
        });
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the mounting thread panicked")))
    })
}

/// `struct loop_info64` of `linux/loop.h`.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of `linux/loop.h`.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

const LOOP_CONFIGURE: rustix::ioctl::Opcode = 0x4C0A;
const LOOP_CTL_GET_FREE: rustix::ioctl::Opcode = 0x4C82;
/// Read-only (1), freed with its last user (4), bypassing the page cache (16).
const LOOP_FLAGS: u32 = 1 | 4 | 16;

/// `LOOP_CTL_GET_FREE`, whose result is the return value.
struct LoopGetFree;

// SAFETY: the call takes no argument and writes nothing.
unsafe impl rustix::ioctl::Ioctl for LoopGetFree {
    type Output = i32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> rustix::ioctl::Opcode {
        LOOP_CTL_GET_FREE
    }

    fn as_ptr(&mut self) -> *mut core::ffi::c_void {
        core::ptr::null_mut()
    }

    unsafe fn output_from_ptr(out: i32, _: *mut core::ffi::c_void) -> rustix::io::Result<i32> {
        Ok(out)
    }
}

/// Puts a file behind a loop device that goes away with its last user; the descriptor is one.
fn attach_loop(path: &Path) -> io::Result<(OwnedFd, PathBuf)> {
    let refused = || MountFailure::at(format!("the layer {} on a loop device", path.display()));
    let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(refused())?;
    let control = rustix::fs::open("/dev/loop-control", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(refused())?;
    for _ in 0..LOOP_RETRIES_MAX {
        // SAFETY: `LoopGetFree` describes this call truly, and the descriptor is a loop-control device.
        let number = unsafe { rustix::ioctl::ioctl(&control, LoopGetFree) }.map_err(refused())?;
        let mut device_path = String::from("/dev/loop");
        write!(device_path, "{number}").map_err(io::Error::other)?;
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let device = rustix::fs::open(device_path.as_str(), flags, Mode::empty()).map_err(refused())?;
        match configure_loop(device.as_fd(), file.as_fd()) {
            Ok(()) => return Ok((device, device_path.into())),
            Err(Errno::BUSY) => {}
            Err(errno) => return Err(refused()(errno)),
        }
    }
    Err(refused()(Errno::BUSY))
}

fn configure_loop(device: BorrowedFd<'_>, file: BorrowedFd<'_>) -> Result<(), Errno> {
    let info = LoopInfo {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: LOOP_FLAGS,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
    let fd = u32::try_from(file.as_raw_fd()).map_err(|_negative| Errno::BADF)?;
    let config = LoopConfig { fd, block_size: 0, info, reserved: [0; 8] };
    // SAFETY: the layout is that of `struct loop_config`, which LOOP_CONFIGURE reads.
    let configure = unsafe { rustix::ioctl::Setter::<LOOP_CONFIGURE, LoopConfig>::new(config) };
    // SAFETY: the descriptor is a loop device; the call only reads its argument.
    unsafe { rustix::ioctl::ioctl(device, configure) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_in_option_strings_are_escaped() {
        let mut options = Vec::new();
        push_escaped(&mut options, Path::new("/a:b/c,d\\e"));
        assert_eq!(options, b"/a\\:b/c\\,d\\\\e");
    }

    #[test]
    fn the_topmost_of_equal_layers_stays() {
        let lowers = ["base", "empty", "more", "empty", "top"].map(PathBuf::from).to_vec();
        let root = LayeredRoot { lowers, ..LayeredRoot::default() };
        let expected = ["top", "empty", "more", "base"].map(Path::new);
        assert_eq!(root.distinct_lowers(), expected);
    }

    #[test]
    fn loop_structures_are_as_long_as_the_kernels() {
        assert_eq!(size_of::<LoopInfo>(), 232);
        assert_eq!(size_of::<LoopConfig>(), 304);
    }

    #[test]
    fn options_beyond_a_page_are_refused_with_the_reason() {
        let scratch: OwnedFd = std::fs::File::open("/").unwrap().into();
        let error = mount_overlay_at(&scratch, vec![b'x'; MOUNT_DATA_BYTES_MAX]).unwrap_err();
        assert!(error.to_string().contains("4096 bytes of options"), "{error}");
    }
}
