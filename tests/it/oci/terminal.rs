//! Terminals: a socket that gets the master, and handles on processes that are passed the same way.

use std::fs::File;
use std::io::{IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixListener;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use serde_json::json;

use super::bundle::{Bundle, ended};

/// The descriptor that the next client sends, and what it says with it.
fn receive(listener: &UnixListener) -> (OwnedFd, Vec<u8>) {
    let (socket, _) = listener.accept().unwrap();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0; 4096];
    let mut io = [IoSliceMut::new(&mut bytes)];
    let got = rustix::net::recvmsg(socket.as_fd(), &mut io, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    (fd.expect("a descriptor"), bytes[..got.bytes].to_vec())
}

fn read_until(master: &mut File, wanted: &str) -> String {
    let mut all = String::new();
    let mut part = [0; 512];
    while !all.contains(wanted) {
        let n = master.read(&mut part).unwrap_or(0);
        assert!(n > 0, "the terminal ended after {all:?}");
        all.push_str(&String::from_utf8_lossy(&part[..n]));
    }
    all
}

#[test]
fn a_console_socket_gets_the_master_of_the_terminal() {
    let Some(bundle) = Bundle::new(&["sh", "-c", "stty size; read line; echo got $line"]) else { return };
    bundle.change(|config| {
        config["process"]["terminal"] = json!(true);
        config["process"]["consoleSize"] = json!({"height": 33, "width": 101});
    });
    let id = &bundle.id("tty");
    let path =
        bundle.sandbox.files.join("a directory with a name that is longer than an address may be ".repeat(2));
    std::fs::create_dir(&path).unwrap();
    // The path is too long for an address: it has to be reached another way.
    let short = bundle.sandbox.files.join("s");
    std::os::unix::fs::symlink(&path, &short).unwrap();
    let listener = UnixListener::bind(short.join("console")).unwrap();
    let socket = path.join("console");
    for verb in ["create", "run"] {
        let detach = if verb == "run" { "--detach=true" } else { "--pid-file=pid" };
        let args = [verb, detach, "-b", bundle.path(), "--console-socket", socket.to_str().unwrap(), id];
        let (child, files) = bundle.begin(bundle.command(&args));
        let (master, text) = receive(&listener);
        bundle.end(child, files, &args).ok();
        assert!(!text.is_empty());
        if verb == "create" {
            bundle.oci(&["start", id]).ok();
        }
        let mut master = File::from(master);
        assert!(read_until(&mut master, "101").contains("33 101"));
        master.write_all(b"words\n").unwrap();
        read_until(&mut master, "got words");
        bundle.oci(&["delete", "--force", id]).ok();
    }
    bundle.assert_no_traces();
}

#[test]
fn a_terminal_without_anybody_to_hold_it_is_refused() {
    let Some(bundle) = Bundle::new(&["true"]) else { return };
    let id = &bundle.id("refused");
    let create = |args: &[&str]| {
        let all: Vec<&str> = args.iter().chain(&["-b", bundle.path(), id]).copied().collect();
        bundle.oci(&all)
    };
    let unused = ["cannot use console socket"];
    create(&["create", "--console-socket", "x"]).fails(1, &unused);
    create(&["run", "--console-socket", "x"]).fails(1, &unused);
    bundle.change(|config| config["process"]["terminal"] = json!(true));
    for args in [&["create"][..], &["run", "-d"]] {
        create(args).fails(1, &["cannot allocate tty", "console socket"]);
    }
    create(&["create", "--console-socket", "/nonexistent/socket"]).fails(1, &["/nonexistent/socket"]);
    bundle.assert_gone(id);
    bundle.assert_no_traces();
}

#[test]
fn in_the_foreground_the_terminal_of_the_program_is_connected_to_the_caller_s() {
    let Some(bundle) = Bundle::new(&["sh", "-c", "tty; echo one; read x; echo got $x"]) else { return };
    if xtask::shell::find("script").is_none() {
        println!("skipped: needs script");
        return;
    }
    bundle.change(|config| config["process"]["terminal"] = json!(true));
    let line = xtask::shell::line(&bundle.command(&["run", "-b", bundle.path(), &bundle.id("front")]));
    let out = bundle.sandbox.files.join("shown");
    // What the runtime writes goes to its standard output, whatever terminal it borrows.
    let piped = format!("{line} > {}", out.display());
    let mut command = bundle.command(&[]);
    let environment: Vec<_> =
        command.get_envs().filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned()))).collect();
    command = xtask::shell::command("script");
    command.env_clear().envs(environment).args(["-qec", &piped, "/dev/null"]);
    let mut child =
        command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::null()).spawn().unwrap();
    child.stdin.as_mut().unwrap().write_all(b"words\n").unwrap();
    assert!(super::bundle::ends_in_time(i32::try_from(child.id()).unwrap()));
    assert!(child.wait().unwrap().success());
    let shown = std::fs::read_to_string(out).unwrap();
    // What was typed is echoed at any moment.
    let lines: Vec<&str> = shown.split('\n').filter(|line| *line != "words").collect();
    assert_eq!(lines, ["/dev/pts/0", "one", "got words", ""], "{shown:?}");
    bundle.assert_no_traces();
}

#[test]
fn an_exec_can_have_a_terminal_of_its_own() {
    let Some(bundle) = Bundle::new(&["sleep", "1000"]) else { return };
    let id = &bundle.running("exectty");
    let socket = bundle.sandbox.files.join("console");
    let listener = UnixListener::bind(&socket).unwrap();
    let args =
        ["exec", "-t", "-d", "--console-socket", socket.to_str().unwrap(), id, "sh", "-c", "tty; read x"];
    let (child, files) = bundle.begin(bundle.command(&args));
    let (master, _) = receive(&listener);
    bundle.end(child, files, &args).ok();
    read_until(&mut File::from(master), "/dev/pts/");
    bundle.oci(&["exec", "-t", "-d", id, "true"]).fails(255, &["cannot allocate tty"]);
    bundle.oci(&["delete", "--force", id]).ok();
    bundle.assert_no_traces();
}

#[test]
fn a_pidfd_socket_gets_a_handle_on_the_process() {
    let Some(bundle) = Bundle::new(&["sleep", "1000"]) else { return };
    let id = &bundle.id("pidfd");
    let socket = bundle.sandbox.files.join("pidfd");
    let listener = UnixListener::bind(&socket).unwrap();
    let args = ["run", "-d", "-b", bundle.path(), "--pidfd-socket", socket.to_str().unwrap(), id];
    let (child, files) = bundle.begin(bundle.command(&args));
    let (pidfd, _) = receive(&listener);
    bundle.end(child, files, &args).ok();
    rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL).unwrap();
    assert!(ended(&pidfd));
    bundle.assert_status(id, "stopped");
    bundle.oci(&["delete", id]).ok();
    bundle.assert_no_traces();
}
