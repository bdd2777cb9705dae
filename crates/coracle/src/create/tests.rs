use std::net::IpAddr;
use std::path::{Path, PathBuf};

use coracle_engine::{CreateSpec, PullPolicy};
use coracle_state::container::{
    LogSpec, MountSource, NetworkMode, Protocol, PublishSpec, RestartPolicy, SeccompChoice,
};

use super::{Outside, Wanted, flags, read};
use crate::cli::{Usage, flags::parse};

fn outside() -> Outside<'static> {
    Outside {
        env: &|name| (name == "HOME").then(|| "/root".to_owned()),
        read: &|path: &Path| match path.to_str() {
            Some("/env") => Ok("# c\nA=1\n\nHOME\nNONE\n  B=x y\n".to_owned()),
            Some("/bad-env") => Ok("=x\n".to_owned()),
            Some("/spaced-env") => Ok("a b=1\n".to_owned()),
            Some("/seccomp.json") => Ok("{ \"defaultAction\" : \"SCMP_ACT_ALLOW\" }".to_owned()),
            _ => Err(std::io::ErrorKind::NotFound.into()),
        },
        caller: coracle_engine::Caller { uid: 1000, gid: 1001 },
        directory: &|| Ok(PathBuf::from("/work/dir")),
    }
}

/// Words of a line; single quotes keep spaces together.
fn words(line: &str) -> Vec<String> {
    let mut out = vec![];
    for (at, piece) in line.split('\'').enumerate() {
        if at % 2 == 1 {
            out.push(piece.to_owned());
        } else {
            out.extend(piece.split_whitespace().map(str::to_owned));
        }
    }
    out
}

fn wanted(line: &str) -> Result<Wanted, String> {
    let parsed = parse(flags::FOR_RUN, false, &words(line)).map_err(|e| match e {
        Usage::Wrong { message, .. } => message,
        Usage::Help => "help".to_owned(),
    })?;
    read(&parsed, &outside(), parsed.is_on("detach"))
}

fn spec(line: &str) -> CreateSpec {
    match wanted(line) {
        Ok(wanted) => wanted.spec,
        Err(e) => panic!("{line}: {e}"),
    }
}

fn fails(line: &str, want: &str) {
    assert_eq!(wanted(line).map(|w| w.spec.image), Err(want.to_owned()), "{line}");
}

#[test]
fn options_end_at_the_image() {
    let s = spec("-it --rm --name web -e A=1 redis:7 redis-server --port 1 -it");
    assert_eq!((s.image.as_str(), s.name.as_deref()), ("redis:7", Some("web")));
    assert_eq!(s.cmd, ["redis-server", "--port", "1", "-it"]);
    assert!(s.tty && s.open_stdin && s.lifecycle.auto_remove);
    assert_eq!(s.attach, ["stdin", "stdout", "stderr"]);
    assert_eq!(spec("-d x").attach, Vec::<String>::new());
    assert_eq!(spec("-a STDERR x").attach, ["stderr"]);
    fails("-d -a stdout x", "conflicting options: cannot specify both --attach and --detach");
    fails(
        "-a foo x",
        "invalid argument \"foo\" for \"-a, --attach\" flag: valid streams are STDIN, STDOUT and STDERR",
    );
}

#[test]
fn the_environment_is_files_first_and_takes_values_of_the_caller() {
    let s = spec("--env-file /env -e HOME -e GONE -e C= x");
    assert_eq!(s.env, ["A=1", "HOME=/root", "B=x y", "HOME=/root", "GONE", "C="]);
    fails("-e =x y", "invalid argument \"=x\" for \"-e, --env\" flag: invalid environment variable: =x");
    fails("--env-file /none x", "open /none: no such file or directory");
    fails("--env-file /bad-env x", "invalid env file (/bad-env): no variable name on line '=x'");
    fails("--env-file /spaced-env x", "invalid env file (/spaced-env): variable 'a b' contains whitespaces");
}

#[test]
fn process_options() {
    let s =
        spec("-u 1000:1000 -w /srv --entrypoint sh -h box --domainname d --group-add audio --init x -c true");
    assert_eq!(s.user.as_deref(), Some("1000:1000"));
    assert_eq!(s.entrypoint, Some(vec!["sh".to_owned()]));
    assert_eq!((s.hostname.as_deref(), s.working_dir.as_deref()), (Some("box"), Some("/srv")));
    assert!(s.init);
    assert_eq!(spec("--entrypoint '' x").entrypoint, Some(Vec::new()));
    assert_eq!(spec("x").entrypoint, None);
    fails("-w srv x", "the working directory 'srv' is invalid, it needs to be an absolute path");
    assert_eq!(spec("--pull=always x").pull, PullPolicy::Always);
    fails("--pull=x x", "invalid pull option: 'x': must be one of \"always\", \"missing\" or \"never\"");
}

fn port(container: u16, ip: Option<&str>, first: u16, last: u16) -> PublishSpec {
    PublishSpec {
        container_port: container,
        protocol: Protocol::Tcp,
        host_ip: ip.map(|i| i.parse::<IpAddr>().unwrap()),
        host_port: first,
        host_port_last: last,
    }
}

#[test]
fn ports_have_many_forms() {
    let ports = |line: &str| spec(&format!("{line} x")).network.publish;
    assert_eq!(ports("-p 80"), [port(80, None, 0, 0)]);
    assert_eq!(ports("-p8080:80"), [port(80, None, 8080, 8080)]);
    assert_eq!(ports("-p 127.0.0.1:8080:80"), [port(80, Some("127.0.0.1"), 8080, 8080)]);
    assert_eq!(ports("-p 127.0.0.1::80"), [port(80, Some("127.0.0.1"), 0, 0)]);
    assert_eq!(ports("-p [::1]:8080:80"), [port(80, Some("::1"), 8080, 8080)]);
    assert_eq!(ports("-p 8000-8010:80"), [port(80, None, 8000, 8010)]);
    assert_eq!(ports("-p 8000-8001:80-81"), [port(80, None, 8000, 8000), port(81, None, 8001, 8001)]);
    assert_eq!(ports("-p 53:53/udp")[0].protocol, Protocol::Udp);
    assert_eq!(ports("--publish published=8080,target=80"), [port(80, None, 8080, 8080)]);
    assert_eq!(
        spec("-p 80 --expose 443 --expose 5-6/udp x").network.exposed,
        ["443/tcp", "5/udp", "6/udp", "80/tcp"]
    );
}

#[test]
fn wrong_ports_are_named() {
    let flag =
        |value: &str, why: &str| format!("invalid argument \"{value}\" for \"-p, --publish\" flag: {why}");
    fails("-p abc x", &flag("abc", "invalid containerPort: abc"));
    fails("-p abc:80 x", &flag("abc:80", "invalid hostPort: abc"));
    fails("-p 70000 x", &flag("70000", "invalid containerPort: 70000"));
    fails("-p 80/foo x", &flag("80/foo", "invalid proto: foo"));
    fails("-p 1.2.3:80:80 x", &flag("1.2.3:80:80", "invalid IP address: 1.2.3"));
    fails("-p 80: x", &flag("80:", "no port specified: 80:<empty>"));
    fails(
        "-p 1-3:1-2 x",
        &flag("1-3:1-2", "invalid ranges specified for container and host Ports: 1-2 and 1-3"),
    );
    fails("--expose a:b x", "invalid port format for --expose: a:b");
    fails("--expose a x", "invalid range format for --expose: a, error: invalid port range: a");
}

#[test]
fn volumes_are_binds_names_or_anonymous() {
    let mounts = |line: &str| spec(&format!("{line} x")).mounts;
    let m = &mounts("-v /host/../h:/data:ro")[0];
    assert!(m.create_source && m.spec.read_only);
    assert_eq!(m.spec.mode, "ro");
    assert!(matches!(&m.spec.source, MountSource::Bind { path, recursive: true, .. } if path == "/h"));
    let m = &mounts("-v ./src:/src:z,rshared")[0];
    assert!(
        matches!(&m.spec.source, MountSource::Bind { path, propagation, .. } if path == "/work/dir/src" && propagation == "rshared")
    );
    let m = &mounts("-v data:/data/:nocopy")[0];
    assert!(m.no_copy && m.spec.target == "/data");
    assert!(matches!(&m.spec.source, MountSource::Volume { name, anonymous: false, .. } if name == "data"));
    assert!(matches!(&mounts("-v /anon")[0].spec.source, MountSource::Volume { anonymous: true, .. }));
    fails("-v a::b x", "invalid spec: a::b: empty section between colons");
    fails("-v a:/b:bad x", "invalid volume specification: 'a:/b:bad': invalid mode: bad");
    fails(
        "-v a:b x",
        "invalid volume specification: 'a:b': invalid mount config for type \"volume\": invalid mount path: 'b' mount path must be absolute",
    );
    fails(
        "-v /a:/ x",
        "invalid volume specification: '/a:/': invalid mount config for type \"bind\": invalid specification: destination can't be '/'",
    );
    fails("-v /a:/c -v /b:/c x", "Duplicate mount point: /c");
    fails("-v a:b:c:d x", "invalid volume specification: 'a:b:c:d'");
    assert!(
        wanted("-v a/b:/c x").unwrap_err().contains("includes invalid characters for a local volume name")
    );
}

#[test]
fn the_long_form_of_mounts() {
    let mount = |text: &str| spec(&format!("--mount {text} x")).mounts.remove(0);
    let m = mount("type=bind,source=/a,target=/b,readonly,bind-propagation=rslave");
    assert!(!m.create_source && m.spec.read_only);
    assert!(matches!(m.spec.source, MountSource::Bind { propagation, .. } if propagation == "rslave"));
    let m = mount(
        "source=vol,dst=/b,volume-nocopy,volume-opt=type=tmpfs,volume-opt=device=tmpfs,volume-label=a=b",
    );
    assert!(m.no_copy);
    assert_eq!((m.volume_options["device"].as_str(), m.volume_labels["a"].as_str()), ("tmpfs", "b"));
    let m = mount("type=tmpfs,target=/t,tmpfs-size=64m,tmpfs-mode=1770");
    assert_eq!(
        m.spec.source,
        MountSource::Tmpfs { options: vec!["size=67108864".into(), "mode=1770".into()] }
    );
    let m = mount("type=volume,target=/b,volume-subpath=s,src=vol,\"volume-opt=o=a,b\",volume-opt=device=d");
    assert_eq!(m.volume_options["o"], "a,b");
    let flag = |value: &str, why: &str| format!("invalid argument \"{value}\" for \"--mount\" flag: {why}");
    fails("--mount type=bind,src=/a x", &flag("type=bind,src=/a", "target is required"));
    fails("--mount bogus x", &flag("bogus", "invalid field 'bogus' must be a key=value pair"));
    fails("--mount a=b,dst=/x x", &flag("a=b,dst=/x", "unknown option 'a' in 'a=b'"));
    fails(
        "--mount type=bind,src=/a,dst=/b,volume-nocopy x",
        &flag(
            "type=bind,src=/a,dst=/b,volume-nocopy",
            "cannot mix 'volume-*' options with mount type 'bind'",
        ),
    );
    fails(
        "--mount type=foo,dst=/x x",
        &flag("type=foo,dst=/x", "invalid mount config for type \"foo\": mount type unknown"),
    );
    fails("--mount dst=/x,ro=maybe x", &flag("dst=/x,ro=maybe", "invalid value for ro: maybe"));
}

#[test]
fn memory_file_systems() {
    let m = spec("--tmpfs /run:size=64m,noexec --read-only x");
    assert!(m.security.readonly_rootfs);
    assert_eq!(
        m.mounts[0].spec.source,
        MountSource::Tmpfs { options: vec!["size=64m".into(), "noexec".into()] }
    );
    fails("--tmpfs /run:bogus x", "Invalid tmpfs option [\"bogus\"]");
}

#[test]
fn limits_are_read_as_docker_reads_them() {
    let r = spec("-m 64m --memory-swap -1 --cpus 1.5 --pids-limit -1 --shm-size 1g --cpuset-cpus 0-1,3 --oom-score-adj -5 -c 512 x").resources;
    assert_eq!(r.memory_bytes, Some(64 << 20));
    assert_eq!(r.memory_swap_bytes, Some(-1));
    assert_eq!(r.nano_cpus, Some(1_500_000_000));
    assert_eq!((r.pids_limit, r.shm_size_bytes), (Some(-1), Some(1 << 30)));
    assert_eq!((r.cpu_shares, r.oom_score_adj), (Some(512), Some(-5)));
    assert_eq!(spec("--pids-limit 0 x").resources.pids_limit, None);
    fails("-m x y", "invalid argument \"x\" for \"-m, --memory\" flag: invalid size: 'x'");
    fails("--cpus x y", "invalid argument \"x\" for \"--cpus\" flag: failed to parse x as a rational number");
    fails(
        "--cpus 0.0000000001 y",
        "invalid argument \"0.0000000001\" for \"--cpus\" flag: value is too precise",
    );
    fails("--cpus 1 --cpu-quota 5 y", "Conflicting options: Nano CPUs and CPU Quota cannot both be set");
    fails(
        "--pids-limit x y",
        "invalid argument \"x\" for \"--pids-limit\" flag: strconv.ParseInt: parsing \"x\": invalid syntax",
    );
    fails("--oom-score-adj 2000 y", "Invalid value 2000, range for oom score adj is [-1000, 1000]");
}

#[test]
fn ulimits_and_devices() {
    let r = spec("--ulimit nofile=10:20 --ulimit nofile=1024 --ulimit core=-1 --device /dev/fuse:rw --device /dev/a:/dev/b:r x").resources;
    let shown: Vec<String> = r.ulimits.iter().map(|u| format!("{}={}:{}", u.name, u.soft, u.hard)).collect();
    assert_eq!(shown, ["core=-1:-1", "nofile=1024:1024"]);
    let shown: Vec<String> =
        r.devices.iter().map(|d| format!("{} {} {}", d.host, d.container, d.permissions)).collect();
    assert_eq!(shown, ["/dev/fuse /dev/fuse rw", "/dev/a /dev/b r"]);
    let flag = |value: &str, why: &str| format!("invalid argument \"{value}\" for \"--ulimit\" flag: {why}");
    fails("--ulimit x y", &flag("x", "invalid ulimit argument: x"));
    fails("--ulimit foo=1 y", &flag("foo=1", "invalid ulimit type: foo"));
    fails(
        "--ulimit nofile=5:3 y",
        &flag("nofile=5:3", "ulimit soft limit must be less than or equal to hard limit: 5 > 3"),
    );
    fails(
        "--device /dev/a:/dev/b:xyz y",
        "invalid argument \"/dev/a:/dev/b:xyz\" for \"--device\" flag: bad mode specified: xyz",
    );
    fails("--device dev y", "invalid argument \"dev\" for \"--device\" flag: dev is not an absolute path");
}

#[test]
fn rights() {
    let s = spec("--privileged --cap-add net_admin --cap-drop ALL --security-opt no-new-privileges --security-opt seccomp=/seccomp.json --security-opt systempaths=unconfined --pid host --ipc container:x --sysctl net.core.somaxconn=5 x").security;
    assert!(s.privileged && s.no_new_privileges && s.unmasked);
    assert_eq!((s.cap_add[0].as_str(), s.cap_drop[0].as_str()), ("CAP_NET_ADMIN", "ALL"));
    assert_eq!(s.seccomp, SeccompChoice::Profile("{\"defaultAction\":\"SCMP_ACT_ALLOW\"}".into()));
    assert_eq!((s.pid_mode.as_str(), s.ipc_mode.as_str()), ("host", "container:x"));
    assert_eq!(s.sysctls["net.core.somaxconn"], "5");
    assert_eq!(spec("--security-opt seccomp:unconfined x").security.seccomp, SeccompChoice::Unconfined);
    fails("--security-opt foo x", "invalid --security-opt: \"foo\"");
    let opened = spec("--security-opt unmask=/proc/acpi:/sys/* --security-opt mask=/proc/version x").security;
    assert_eq!(opened.unmask, ["/proc/acpi", "/sys/*"]);
    assert_eq!((opened.mask, opened.unmasked), (vec!["/proc/version".to_owned()], false));
    assert!(spec("--security-opt unmask=ALL x").security.unmasked);
    assert!(spec("--security-opt writable-cgroups=true x").security.writable_cgroups);
    assert!(!spec("--security-opt no-new-privileges:false x").security.no_new_privileges);
    fails("--security-opt no-new-privileges=maybe x", "invalid --security-opt: \"no-new-privileges=maybe\"");
    let relative = "invalid --security-opt: \"mask=/a:b\": \"b\" is not an absolute path";
    fails("--security-opt mask=/a:b x", relative);
    fails(
        "--security-opt seccomp=/none x",
        "opening seccomp profile (/none) failed: open /none: no such file or directory",
    );
    fails("--pid x y", "--pid: invalid PID mode");
    fails("--ipc x y", "--ipc: invalid IPC mode");
    fails("--userns x y", "--userns: invalid USER mode");
    fails(
        "--sysctl kernel.panic=1 y",
        "invalid argument \"kernel.panic=1\" for \"--sysctl\" flag: sysctl 'kernel.panic=1' is not allowed",
    );
}

#[test]
fn connections() {
    let n = spec("--network host x").network;
    assert_eq!((n.mode, n.attachments.len()), (NetworkMode::Host, 0));
    assert_eq!(spec("--net container:web x").network.mode, NetworkMode::Container("web".into()));
    let n = spec("--ip 10.0.0.5 --mac-address 02-42-AC-11-00-02 --network-alias db --dns 1.1.1.1 --dns-search a.b --add-host h:1.2.3.4 --add-host g=host-gateway x").network;
    assert_eq!(n.mode, NetworkMode::Bridge);
    assert_eq!(n.attachments[0].network, "bridge");
    assert_eq!(n.attachments[0].ipv4, Some("10.0.0.5".parse().unwrap()));
    assert_eq!(n.attachments[0].mac.as_deref(), Some("02:42:ac:11:00:02"));
    assert_eq!(n.attachments[0].aliases, ["db"]);
    assert_eq!(n.extra_hosts, ["h:1.2.3.4", "g:host-gateway"]);
    let n = spec("--network name=back,alias=a,ip=10.1.0.9 --network front x").network;
    assert_eq!(n.attachments.iter().map(|a| a.network.as_str()).collect::<Vec<_>>(), ["back", "front"]);
    fails(
        "--network host --network a x",
        "conflicting options: cannot attach both user-defined and non-user-defined network-modes",
    );
    fails("--network container: x", "invalid container format container:<name|id>");
    fails(
        "--network container:a -p 80 x",
        "conflicting options: port publishing and the container type network mode",
    );
    fails("--dns x y", "invalid argument \"x\" for \"--dns\" flag: IP address is not correctly formatted: x");
    fails("--add-host h y", "invalid argument \"h\" for \"--add-host\" flag: bad format for add-host: \"h\"");
    fails(
        "--add-host h:x y",
        "invalid argument \"h:x\" for \"--add-host\" flag: invalid IP address in add-host: \"x\"",
    );
    fails("--mac-address x y", "x is not a valid mac address");
    let warned = wanted("--network host -p 80:80 x").unwrap().warnings;
    assert_eq!(warned, ["Published ports are discarded when using host network mode"]);
}

#[test]
fn care() {
    let restart = |text: &str| spec(&format!("--restart {text} x")).lifecycle.restart;
    assert_eq!(restart("always"), RestartPolicy::Always);
    assert_eq!(restart("unless-stopped"), RestartPolicy::UnlessStopped);
    assert_eq!(restart("on-failure:3"), RestartPolicy::OnFailure { retries_max: 3 });
    assert_eq!(restart("on-failure"), RestartPolicy::OnFailure { retries_max: 0 });
    fails(
        "--restart sometimes x",
        "invalid restart policy: unknown policy 'sometimes'; use one of 'no', 'always', 'on-failure', or 'unless-stopped'",
    );
    fails(
        "--restart always:3 x",
        "invalid restart policy: maximum retry count can only be used with 'on-failure'",
    );
    fails(
        "--restart on-failure:x x",
        "invalid restart policy format: maximum retry count must be an integer",
    );
    fails("--restart always --rm x", "conflicting options: cannot specify both --restart and --rm");
    let s =
        spec("--log-opt max-size=1m --log-opt max-file=2 --stop-signal SIGINT --stop-timeout 3 x").lifecycle;
    let LogSpec::JsonFile { size_max_bytes, files_max, .. } = s.log else {
        panic!("json-file is the default")
    };
    assert_eq!((size_max_bytes, files_max), (1 << 20, 2));
    assert_eq!((s.stop_signal.as_str(), s.stop_timeout_s), ("SIGINT", Some(3)));
    assert_eq!(spec("--log-driver none x").lifecycle.log, LogSpec::None);
    fails("--log-driver syslog x", "logger: no log driver named 'syslog' is registered");
    fails("--log-opt foo=1 x", "unknown log opt 'foo' for json-file log driver");
    fails("--log-opt max-file=0 x", "max-file cannot be less than 1");
}

#[test]
fn health_checks_are_kept() {
    let check = spec("--health-cmd true --health-interval 1s --health-retries 2 x").lifecycle.healthcheck;
    assert_eq!(
        check.unwrap(),
        serde_json::json!({"Test": ["CMD-SHELL", "true"], "Interval": 1_000_000_000, "Retries": 2})
    );
    assert_eq!(
        spec("--no-healthcheck x").lifecycle.healthcheck.unwrap(),
        serde_json::json!({"Test": ["NONE"]})
    );
    fails("--no-healthcheck --health-cmd x y", "--no-healthcheck conflicts with --health-* options");
    fails(
        "--health-interval x y",
        "invalid argument \"x\" for \"--health-interval\" flag: time: invalid duration \"x\"",
    );
}

#[test]
fn labels_and_what_is_not_offered() {
    let s = spec("-l a=1 --label b --annotation c=d x");
    assert_eq!((s.labels["a"].as_str(), s.labels["b"].as_str(), s.annotations["c"].as_str()), ("1", "", "d"));
    fails(
        "--storage-opt size=1g x",
        "--storage-opt is not supported: the root file system has no size limit; use a volume on a file system with one",
    );
    fails(
        "--volume-driver nfs x",
        "invalid argument \"nfs\" for \"--volume-driver\" flag: the only driver is local",
    );
    assert_eq!(wanted("--link a:b x").unwrap().warnings.len(), 1);
}
